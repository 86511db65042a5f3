"""Variants in lower precision: int8 for CPUs and float16 for CUDA, each behind a gate on accuracy and speed."""
