"""The parts of a step on CPU and their time: `python -m benchmarks.step_parts`."""
