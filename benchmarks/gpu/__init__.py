"""Everything that is measured on a GPU, in ten minutes of a borrowed card: ``python -m benchmarks.gpu --out DIR``.

part.py         what a part writes: rows, saved one by one
correctness.py  every kernel once, then the tests that need a GPU
kernels.py      every function on the features of real models, beside a copy of the same bytes
loops.py        denoising loops of real architectures with random weights, beside other caches
kan.py          KAN layers, forward and backward
memcheck.py     compute-sanitizer's memcheck on every kernel
summary.py      thirty lines about all of it
"""
