"""Attention without the matrix of all scores (Dao et al. 2022, "FlashAttention")."""

from infopt.kernels.flash_attention.api import IMPLEMENTATIONS, available, flash_attention, merged, with_sink_logits

__all__ = ["IMPLEMENTATIONS", "available", "flash_attention", "merged", "with_sink_logits"]
