"""Measurements of the engine and of the running service. Each module is a command, see README.md."""
