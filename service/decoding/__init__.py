"""Bytes to uint8 [H, W, 3]: where an image is decoded, and under which limits."""
