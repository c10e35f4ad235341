"""Decode steps of full-size models as one program: `python -m benchmarks.whole_step`."""
