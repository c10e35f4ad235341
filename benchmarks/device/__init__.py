"""The kit for the day a TPU or GPU is there: `python -m benchmarks.device`."""
