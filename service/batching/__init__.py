"""Admission, queue and batcher: which images run together, and when."""
