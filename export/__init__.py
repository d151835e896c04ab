"""``python -m export``: a diffusers pipeline becomes models in a Triton repository.

The only part of the project that needs torch; nothing here is imported by the server.
"""
