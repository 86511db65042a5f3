"""The same job on other serving frameworks, beside this service: `python -m benchmarks.rivals`."""
