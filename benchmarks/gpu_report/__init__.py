"""One report of a GPU host: `python -m benchmarks.gpu_report`."""
