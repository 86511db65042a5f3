"""One HTTP/1.1 connection under uvicorn: limits, timeouts, drain. The only package that imports uvicorn."""
