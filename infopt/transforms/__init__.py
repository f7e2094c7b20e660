"""The transforms: one file each. Siblings never import each other; `base` is what they share."""

from infopt.transforms.base import Transform, compose
from infopt.transforms.cache_kv import cache_kv
from infopt.transforms.dequantize import dequantize
from infopt.transforms.flash_attention import flash_attention
from infopt.transforms.gqa import gqa
from infopt.transforms.paged import paged
from infopt.transforms.parse import parse_stack, stack_option
from infopt.transforms.quantize import quantize
from infopt.transforms.rotate import rotate
from infopt.transforms.sliding_window import sliding_window
from infopt.transforms.speculative import self_draft, speculative

__all__ = [
    "Transform",
    "cache_kv",
    "compose",
    "dequantize",
    "flash_attention",
    "gqa",
    "paged",
    "parse_stack",
    "quantize",
    "rotate",
    "self_draft",
    "sliding_window",
    "speculative",
    "stack_option",
]
