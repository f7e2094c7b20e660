"""The shapes of flash attention that its contract, its benchmark and its tuning share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt.typing import Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """One case.

    Args:
      name: what it is about.
      batch, queries, keys, heads, kv_heads, width, value_width: B, T, S, H, K, D and E (D where None).
      causal, window, sinks, softcap, scale: as for `flash_attention`.
      lengths, offsets: a row's, or None.
      segments: how many texts lie in a row, one after the other.
      dtype: of queries, keys and values.
      sink_logits: whether there are any.
    """

    name: str
    batch: int = 1
    queries: int = 33
    keys: int | None = None
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int | None = None
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    scale: float | None = None
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    segments: int | None = None
    dtype: str = "float32"
    sink_logits: bool = False

    @property
    def length(self) -> int:
        return self.queries if self.keys is None else self.keys

    def arrays(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """Normal queries, keys and values."""
        sizes = (
            (self.batch, self.queries, self.heads, self.width),
            (self.batch, self.length, self.kv_heads, self.width),
            (self.batch, self.length, self.kv_heads, self.value_width or self.width),
        )
        keys = jax.random.split(jax.random.key(seed), 3)
        q, k, v = (jax.random.normal(key, size, jnp.float32).astype(self.dtype) for key, size in zip(keys, sizes))
        return q, k, v

    def options(self, seed: int = 1) -> dict[str, Any]:
        """The keyword arguments of `flash_attention`."""
        rng = np.random.default_rng(seed)
        found: dict[str, Any] = dict(
            causal=self.causal, window=self.window, sinks=self.sinks, softcap=self.softcap, scale=self.scale
        )
        for name in ("lengths", "offsets"):
            given = getattr(self, name)
            found[name] = None if given is None else jnp.asarray(given, jnp.int32)
        if self.sinks:
            size = (self.batch, self.queries, self.heads, self.width)
            found["sink_queries"] = jnp.asarray(rng.normal(size=size), jnp.float32).astype(self.dtype)
        if self.segments:
            ids = [np.arange(n) * self.segments // n for n in (self.queries, self.length)]
            found["segments"] = tuple(jnp.asarray(np.tile(i, (self.batch, 1)), jnp.int32) for i in ids)
        if self.sink_logits:
            found["sink_logits"] = jnp.asarray(rng.normal(size=self.heads), jnp.float32)
        return found

    @property
    def scores(self) -> int:
        """Scores that count, in a row and head, where rows are whole."""
        at = np.arange(self.queries)[:, None] + (self.length - self.queries if self.keys else 0)
        key = np.arange(self.length)[None]
        seen = np.ones((self.queries, self.length), bool)
        if self.causal:
            seen &= key <= at
        if self.window is not None:
            seen &= (key > at - self.window) | (key < self.sinks)
        return int(seen.sum())

    @property
    def flops(self) -> int:
        """Of the two products, over the scores that count."""
        return 2 * self.batch * self.heads * self.scores * (self.width + (self.value_width or self.width))

    @property
    def moved(self) -> int:
        """Bytes that have to be read and written whatever the implementation: queries, keys, values and the output."""
        keys = self.length if self.window is None else min(self.length, self.queries + self.window + self.sinks)
        width = self.width + (self.value_width or self.width)
        return jnp.dtype(self.dtype).itemsize * self.batch * width * (self.queries * self.heads + keys * self.kv_heads)


CONTRACT: tuple[Shape, ...] = (
    Shape("causal"),
    Shape("bidirectional", causal=False),
    Shape("as_many_kv_heads", kv_heads=4),
    Shape("multi_query", kv_heads=1, batch=2),
    Shape("one_query", queries=1, keys=70, offsets=(69,)),
    Shape("one_query_and_key", queries=1),
    Shape("many_blocks", queries=300),
    Shape("exact_blocks", queries=256, width=64),
    Shape("ragged", batch=3, queries=20, keys=150, lengths=(150, 61, 0), offsets=(130, 41, 0)),
    Shape("more_keys_than_queries", queries=5, keys=131, offsets=(126,)),
    Shape("bidirectional_ragged", batch=2, queries=140, causal=False, lengths=(140, 9)),
    Shape("window", queries=270, window=50),
    Shape("window_of_one", queries=40, window=1),
    Shape("window_as_long_as_the_text", queries=40, window=40),
    Shape("window_and_sinks", batch=2, queries=270, window=40, sinks=4, lengths=(270, 100)),
    Shape("more_sinks_than_keys", queries=3, window=9, sinks=7),
    Shape("softcap", queries=150, softcap=2.0, scale=1.0),
    Shape("segments", batch=2, queries=200, segments=3),
    Shape("wide_values", queries=70, value_width=32),
    Shape("sink_logits", queries=70, batch=2, window=30, sink_logits=True),
    Shape("a_row_that_sees_nothing", batch=2, queries=9, keys=30, lengths=(0, 30), sink_logits=True),
    Shape("bfloat16", queries=140, width=64, dtype="bfloat16"),
)
"""Every mask, lengths that are no multiple of a block, one token, empty rows."""


TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Of an output of normal values against float64: float32 sums, and a bfloat16's 8 bits of mantissa."""

TIMED: tuple[Shape, ...] = (
    Shape("smollm2_1k", queries=1024, heads=9, kv_heads=3, width=64),
    Shape("smollm2_4k", queries=4096, heads=9, kv_heads=3, width=64),
    Shape("smollm2_4k_window_512", queries=4096, heads=9, kv_heads=3, width=64, window=512),
    Shape("smollm2_4k_window_512_4_sinks", queries=4096, heads=9, kv_heads=3, width=64, window=512, sinks=4),
    Shape("llama8b_2k", queries=2048, heads=32, kv_heads=8, width=128),
    Shape("chunk_128_of_4k", queries=128, keys=4096, heads=9, kv_heads=3, width=64, offsets=(3968,)),
)
"""What a model asks for, and what the benchmark times."""
