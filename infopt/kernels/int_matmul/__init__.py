"""Products of inputs rounded to 8 bits, a scale a row, with weights in few bits: whole numbers, summed as int32."""

from infopt.kernels.int_matmul.api import IMPLEMENTATIONS, available, int_matmul

__all__ = ["IMPLEMENTATIONS", "available", "int_matmul"]
