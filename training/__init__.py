"""Train a Perceiver (Jaegle et al. 2021) for image classification."""
