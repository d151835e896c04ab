"""Likeness before and after the face pass, judged by a network trained on drawn people alone."""
