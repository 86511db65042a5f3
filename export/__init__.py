"""Export: a trained run becomes a model folder that the service can serve, behind a gate that proves it is the same."""
