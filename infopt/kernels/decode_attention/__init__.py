"""Attention of a few new tokens over a long cache, linear, ring or paged, its codec undone on the way."""

from infopt.kernels.decode_attention.api import IMPLEMENTATIONS, available, decode_attention

__all__ = ["IMPLEMENTATIONS", "available", "decode_attention"]
