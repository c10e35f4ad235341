"""One form's measurements, a line of JSON each: MIXTRAL_JAX_ISA names the form.

`python -m benchmarks.cpu_kernels` starts this once for each form, because a process has one.
"""

import sys

from benchmarks.cpu_kernels import attention, products
from mixtral_jax.kernels.cpu import build

# The parts of the benchmark: each has `measurements()`.
PARTS = {"products": products.measurements, "attention": attention.measurements}

if __name__ == "__main__":
    if not build.available():
        sys.exit("the kernels of this form cannot be used")
    for subject in sys.argv[1:]:
        for measurement in PARTS[subject]():
            print(measurement.line(), flush=True)
