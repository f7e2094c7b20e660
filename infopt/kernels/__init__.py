"""Kernels: one folder an operation, one file an implementation, one contract test for all of them.

They take arrays and QTensors, never a Spec. `api.py` has the public signature and picks the implementation; `shapes.py`
the shapes that tests and benchmarks share.
"""
