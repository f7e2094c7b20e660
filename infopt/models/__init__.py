"""The families: one file each, readable from top to bottom."""

from infopt.models.gemma3 import Gemma3Config, gemma3
from infopt.models.llama import LlamaConfig, llama

__all__ = ["Gemma3Config", "LlamaConfig", "gemma3", "llama"]
