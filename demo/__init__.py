"""The demo model: a drawn world, and the networks trained on it (``python -m demo.<script>``)."""
