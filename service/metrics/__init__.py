"""Every Prometheus metric, and the readings of GPU and process."""
