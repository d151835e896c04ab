"""closeup: text-to-image generation that gets faces right, served by Triton."""

__version__ = "0.1.0"
