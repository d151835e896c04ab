"""Measurements of the server against the same graph in PyTorch eager: ``python -m benchmarks``."""
