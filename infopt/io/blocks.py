"""GGUF's blocks, taken apart into a QTensor's arrays and put together again, bit for bit."""

from __future__ import annotations

import functools
import operator

import numpy as np
from gguf import GGMLQuantizationType

from infopt.qtensor import Format, pack, unpack

KEPT = {
    GGMLQuantizationType.Q4_0: Format("int4", 32, "float16"),
    GGMLQuantizationType.Q4_1: Format("int4_min", 32, "float16"),
    GGMLQuantizationType.Q8_0: Format("int8", 32, "float16"),
    GGMLQuantizationType.Q4_K: Format("q4_k", 256, "float16"),
    GGMLQuantizationType.Q5_K: Format("q5_k", 256, "float16"),
    GGMLQuantizationType.Q6_K: Format("q6_k", 256, "float16"),
}
"""Block types whose values a QTensor holds, in as many bytes."""

FIELDS = {
    "Q4_0": {"scale": 2, "codes": 16},
    "Q4_1": {"scale": 2, "minimum": 2, "codes": 16},
    "Q8_0": {"scale": 2, "codes": 32},
    "Q4_K": {"scale": 2, "minimum": 2, "inner": 12, "low": 128},
    "Q5_K": {"scale": 2, "minimum": 2, "inner": 12, "high": 32, "low": 128},
    "Q6_K": {"low": 128, "high": 64, "inner": 16, "scale": 2},
}
"""What a block consists of, in order, and the bytes of each."""

BITS = {"Q4_K": {"low": (4, 32)}, "Q5_K": {"low": (4, 32), "high": (1, 32)}, "Q6_K": {"low": (4, 64), "high": (2, 32)}}
"""How K-quants hold the low and the high bits of their codes: so many bits each, in runs of so many bytes. The
lowest bits of such a run are those of one run of codes, the next ones those of the next run, and so on."""

SIGN = np.array([0, 0x80], np.uint8)
"""That of a 16-bit float, among its bytes."""


def take_apart(kind: GGMLQuantizationType, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks, uint8 `[rows, blocks, bytes]`, as a QTensor's arrays by name, each `[rows, ...]`."""
    row, parts, at = KEPT[kind].row, dict[str, np.ndarray](), 0
    for name, size in FIELDS[kind.name].items():
        parts[name] = np.ascontiguousarray(blocks[..., at : at + size])
        at += size
    if row.sub:
        codes, shift = np.zeros((*blocks.shape[:2], row.group or 0), np.uint8), 0
        for name, (bits, run) in BITS[kind.name].items():
            codes |= _codes(parts.pop(name), bits, run) << shift
            shift += bits
        parts["codes"] = pack(codes, row.bits, np)
    if row.sub and row.minimum:
        parts["inner"] = pack(_numbers(parts["inner"]), row.sub_bits, np)
        parts["minimum"] = parts["minimum"] ^ SIGN  # a block subtracts its minimum
    for name, dtype in {"scale": "<f2", "minimum": "<f2", "codes": row.code_dtype, "inner": row.sub_dtype}.items():
        if name in parts:
            parts[name] = parts[name].reshape(len(blocks), -1).view(dtype)
    return parts


def put_together(kind: GGMLQuantizationType, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The reverse: arrays `[rows, ...]` as blocks, uint8 `[rows, blocks, bytes]`."""
    row, fields = KEPT[kind].row, FIELDS[kind.name]
    shape = *parts["scale"].shape, -1
    parts = {name: np.ascontiguousarray(x).view(np.uint8) for name, x in parts.items()}
    if row.sub:
        group, numbers = row.group or 0, row.sub_numbers
        codes, shift = _in_order(parts["codes"], row.bits, group).reshape(shape), 0
        for name, (bits, run) in BITS[kind.name].items():
            parts[name] = _bytes(codes >> shift & 2**bits - 1, bits, run)
            shift += bits
        if row.minimum:
            parts["inner"] = _six_bits(_in_order(parts["inner"], row.sub_bits, numbers).reshape(shape))
            parts["minimum"] = parts["minimum"].reshape(shape) ^ SIGN
    return np.concatenate([parts[name].reshape(shape) for name in fields], -1)


def _in_order(words: np.ndarray, bits: int, group: int) -> np.ndarray:
    planes = unpack(words, bits, group)
    each = [plane.reshape(*plane.shape[:-1], -1, group // len(planes)) for plane in planes]
    return np.concatenate(each, -1)


def _codes(x: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Bytes `[..., bytes]` as codes of so many bits, `[..., bytes * 8 / bits]`."""
    runs = x.reshape(*x.shape[:-1], -1, 1, run) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (runs & 2**bits - 1).reshape(*x.shape[:-1], -1)


def _bytes(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    runs = codes.reshape(*codes.shape[:-1], -1, 8 // bits, run)
    each = (runs[..., i, :] << i * bits for i in range(8 // bits))
    return functools.reduce(operator.or_, each).reshape(*codes.shape[:-1], -1)


def _numbers(x: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits out of 12 bytes: the latter four of each in what the former leave."""
    scale, minimum, both = np.split(x, 3, -1)
    latter = both & 15 | scale >> 6 << 4, both >> 4 | minimum >> 6 << 4
    return np.concatenate([scale & 63, latter[0], minimum & 63, latter[1]], -1)


def _six_bits(numbers: np.ndarray) -> np.ndarray:
    scale, scale4, minimum, minimum4 = np.split(numbers, 4, -1)
    former = scale | scale4 >> 4 << 6, minimum | minimum4 >> 4 << 6
    return np.concatenate([*former, scale4 & 15 | minimum4 << 4], -1)
