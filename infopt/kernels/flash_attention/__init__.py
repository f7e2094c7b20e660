"""Attention without the matrix of all scores (Dao et al. 2022, "FlashAttention")."""

from infopt.kernels.flash_attention.api import IMPLEMENTATIONS, available, flash_attention

__all__ = ["IMPLEMENTATIONS", "available", "flash_attention"]
