"""Explanations: which regions of an image carry its label, and the image that shows them."""
