"""A maker of K-quant blocks in plain numpy, after llama.cpp's description of them: the gguf package has none.

Scales are taken from each sub-group's range, without llama.cpp's search for better ones: its blocks, not its quality.
"""

from __future__ import annotations

import numpy as np

SIZES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""Bytes of a block of 256 values."""


def quantize(x: np.ndarray, kind: str) -> np.ndarray:
    """Rows `[..., width]` as blocks, uint8 `[..., width / 256 * bytes]`."""
    blocks = x.astype(np.float64).reshape(-1, 256)
    made = _q6_k(blocks) if kind == "Q6_K" else _q4_k_or_q5_k(blocks, 31 if kind == "Q5_K" else 15)
    assert made.shape == (len(blocks), SIZES[kind])
    return made.reshape(*x.shape[:-1], -1)


def random(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """Blocks of any bits at all, but for scales, which are finite halves of both signs: uint8 `[..., bytes]`."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape[:-1])), shape[-1] // 256, SIZES[kind]), np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        halves = rng.integers(0, 1 << 16, blocks.shape[:2], np.uint16)
        halves = np.where(
            halves & 0x7C00 == 0x7C00, halves & 0x83FF, halves
        )  # neither infinite nor NaN; denormals stay
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As 16-bit floats: their bytes, and what they are."""
    halves = x.astype("<f2")
    return halves[:, None].view(np.uint8), halves.astype(np.float64)


def _ratio(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.rint(x / np.where(by == 0, 1, by))


def _q4_k_or_q5_k(blocks: np.ndarray, most: int) -> np.ndarray:
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    scale = (groups.max(-1) - low) / most
    d_bytes, d = _halves(scale.max(-1) / 63)
    m_bytes, m = _halves(-low.min(-1) / 63)
    scales = np.clip(_ratio(scale, d[:, None]), 0, 63).astype(np.uint8)
    minima = np.clip(_ratio(-low, m[:, None]), 0, 63).astype(np.uint8)
    shifted = groups + (m[:, None] * minima)[..., None]
    codes = np.clip(_ratio(shifted, (d[:, None] * scales)[..., None]), 0, most).astype(np.uint8).reshape(-1, 256)
    six = np.zeros((len(blocks), 12), np.uint8)
    for j in range(8):  # get_scale_min_k4, the other way round
        if j < 4:
            six[:, j], six[:, j + 4] = six[:, j] | scales[:, j], six[:, j + 4] | minima[:, j]
        else:
            six[:, j + 4] = scales[:, j] & 15 | (minima[:, j] & 15) << 4
            six[:, j - 4] |= scales[:, j] >> 4 << 6
            six[:, j] |= minima[:, j] >> 4 << 6
    low_bits, high_bits = np.zeros((len(blocks), 128), np.uint8), np.zeros((len(blocks), 32), np.uint8)
    for n in range(4):
        first, second = codes[:, 64 * n : 64 * n + 32], codes[:, 64 * n + 32 : 64 * n + 64]
        low_bits[:, 32 * n : 32 * n + 32] = first & 15 | (second & 15) << 4
        high_bits |= first >> 4 << 2 * n | second >> 4 << 2 * n + 1
    return np.concatenate([d_bytes, m_bytes, six, *([high_bits] if most == 31 else []), low_bits], -1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 16, 16)
    at = np.abs(groups).argmax(-1)[..., None]
    scale = np.take_along_axis(groups, at, -1)[..., 0] / -32
    d_bytes, d = _halves(np.abs(scale).max(-1) / 127)
    scales = np.clip(_ratio(scale, d[:, None]), -128, 127).astype(np.int8)
    codes = np.clip(_ratio(groups, (d[:, None] * scales)[..., None]), -32, 31) + 32
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = [codes[:, n, i] & 15 | (codes[:, n, i + 2] & 15) << 4 for n in range(2) for i in range(2)]
    high = [np.bitwise_or.reduce([codes[:, n, i] >> 4 << 2 * i for i in range(4)]) for n in range(2)]
    return np.concatenate([*low, *high, scales.view(np.uint8), d_bytes], -1)
