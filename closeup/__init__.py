"""closeup: text-to-image generation that gets faces right, served by Triton."""
