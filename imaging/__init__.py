"""Bytes of an image file to uint8 [H, W, 3]: the one decoder of training, export and service."""
