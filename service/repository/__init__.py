"""The model folder: versions, the golden check, and which version is live."""
