"""The shapes of decode attention that its contract, its benchmark and its tuning share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt import cache as kv
from infopt.cache import Layout
from infopt.qtensor import Format
from infopt.spec import Window

CODECS = {"float32": None, "int8": "int8", "int4": "int4_min"}
"""Formats of keys and values by the names that shapes use."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One case.

    Args:
      name: what it is about.
      lengths: tokens that each row holds, the new ones included.
      queries: new tokens, T.
      slots: of the layout, where it is no ring.
      heads, kv_heads, width: H, K, D.
      layers: R.
      window, sinks: of the layer.
      ring: whether the layout is a ring; it looks ahead `queries` tokens.
      page: slots a page, or None.
      codec: a key of `CODECS`; group: channels that share its scale.
      softcap, sink_logits: as for `decode_attention`.
      dtype: of queries, and of keys and values without a codec.
    """

    name: str
    lengths: tuple[int, ...] = (40,)
    queries: int = 1
    slots: int = 64
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    layers: int = 2
    window: int | None = None
    sinks: int = 0
    ring: bool = False
    page: int | None = None
    codec: str = "float32"
    group: int = 16
    softcap: float | None = None
    sink_logits: bool = False
    dtype: str = "float32"

    @property
    def layout(self) -> Layout:
        window = None if self.window is None else Window(self.window, self.sinks)
        if self.ring:
            assert window is not None
            return Layout(window.size + window.sinks + self.queries - 1, window, self.queries, self.page)
        return Layout(self.slots, window, None, self.page)

    @property
    def format(self) -> Format | None:
        name = CODECS[self.codec]
        return None if name is None else Format(name, self.group, "float16")

    @property
    def layer(self) -> int:
        return self.layers - 1

    def text(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Keys and values `[B, longest, K, D]` of each row's whole text, and of its last tokens the queries."""
        rng = np.random.default_rng(seed)
        size = (len(self.lengths), max(max(self.lengths), 1), self.kv_heads, self.width)
        q = (len(self.lengths), self.queries, self.heads, self.width)
        return tuple(rng.normal(size=s).astype(np.float32) for s in (size, size, q, q))

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `decode_attention` is called with: the text written into a cache, into a ring chunk after chunk."""
        keys, values, q, sink_q = (jnp.asarray(x).astype(self.dtype) for x in self.text(seed))
        layout, codec, batch = self.layout, self.format, len(self.lengths)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        table = None
        if self.page is not None:
            order = np.random.default_rng(7).permutation(batch * layout.pages).reshape(batch, -1)
            table = jnp.asarray(order, jnp.int32)
        caches = []
        for x in (keys, values):
            cache = kv.empty(layout, self.layers, batch, self.kv_heads, self.width, codec, self.dtype)
            step = self.queries if self.ring else x.shape[1]
            for start in range(0, x.shape[1], step):
                chunk = x[:, start : start + step]
                at = jnp.broadcast_to(jnp.arange(start, start + chunk.shape[1], dtype=jnp.int32)[None], chunk.shape[:2])
                new = kv.encode(chunk, codec)
                cache = _write(cache, new, self.layer, layout, table, at, at < lengths[:, None])
            caches.append(cache)
        steps = jnp.arange(self.queries, dtype=jnp.int32)[None]
        positions = jnp.maximum(lengths[:, None] - self.queries, 0) + steps
        how: dict[str, Any] = dict(
            layout=layout, heads=self.kv_heads, positions=positions, lengths=lengths, table=table, softcap=self.softcap
        )
        if self.sinks:
            how["sink_queries"] = sink_q
        if self.sink_logits:
            how["sink_logits"] = jnp.linspace(-1.0, 2.0, self.heads)
        return (q, *caches, jnp.int32(self.layer)), how

    @property
    def seen(self) -> int:
        """Keys that the last query of each row sees, in all rows."""
        window = self.layout.window
        most = self.layout.slots if window is None else window.size + window.sinks
        return sum(min(length, most) for length in self.lengths)

    @property
    def flops(self) -> int:
        """Of the two products, over the keys that are seen."""
        return 4 * self.queries * self.heads * self.width * self.seen

    @property
    def moved(self) -> int:
        """Bytes that have to be read whatever the implementation: the layer's keys and values that are seen."""
        token = jnp.zeros((1, 1, self.kv_heads, self.width), self.dtype)
        one = jax.eval_shape(lambda: kv.encode(token, self.format))
        return 2 * self.seen * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))


_write = jax.jit(kv.write, static_argnums=(2, 3), donate_argnums=0)

CONTRACT: tuple[Shape, ...] = (
    Shape("one_token"),
    Shape("the_first_token", lengths=(1,)),
    Shape("five_tokens_under_speculation", queries=5, lengths=(40,)),
    Shape("ragged", lengths=(64, 17, 0, 5), queries=5),
    Shape("multi_query", kv_heads=1, lengths=(40, 7)),
    Shape("as_many_kv_heads", kv_heads=4),
    Shape("longer_than_the_fewest_slots_read", lengths=(300, 20), slots=700),
    Shape("all_slots", lengths=(700, 256), slots=700, queries=3),
    Shape("a_chunk_of_a_prompt", lengths=(140, 128), slots=300, queries=128),
    Shape("linear_window", window=9, lengths=(40, 6)),
    Shape("linear_window_and_sinks", window=9, sinks=3, lengths=(40, 6), queries=3),
    Shape("ring", window=20, ring=True, lengths=(64, 33, 9)),
    Shape("ring_and_sinks", window=20, sinks=4, ring=True, lengths=(64, 33, 9, 2), queries=3),
    Shape("long_ring", window=290, sinks=4, ring=True, lengths=(700, 100)),
    Shape("pages", page=16, lengths=(64, 17, 5)),
    Shape("pages_that_do_not_divide", page=24, lengths=(60, 30), queries=3),
    Shape("pages_of_a_ring_and_sinks", page=8, window=20, sinks=4, ring=True, lengths=(64, 33, 9)),
    Shape("softcap", softcap=1.5, lengths=(40, 12)),
    Shape("sink_logits", sink_logits=True, lengths=(40, 0)),
    Shape("int8", codec="int8", lengths=(40, 12), width=32),
    Shape("int4", codec="int4", lengths=(40, 12), width=32),
    Shape("int8_ring_and_sinks_in_pages", codec="int8", window=20, sinks=4, ring=True, page=8, lengths=(64, 9)),
    Shape("int4_three_heads", codec="int4", heads=9, kv_heads=3, width=64, lengths=(50, 33), queries=2),
    Shape("bfloat16", dtype="bfloat16", lengths=(64, 21), width=64),
)
"""Every layout with every codec, one token and several, empty rows."""

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Of an output of normal values against float64."""

TIMED: tuple[Shape, ...] = tuple(
    dataclasses.replace(Shape("", heads=9, kv_heads=3, width=64, layers=4), **how)
    for how in (
        dict(name="smollm2_200_of_8k", lengths=(200,), slots=8192),
        dict(name="smollm2_8k", lengths=(8192,), slots=8192),
        dict(name="smollm2_8k_int8", lengths=(8192,), slots=8192, codec="int8", group=32),
        dict(name="smollm2_8k_int4", lengths=(8192,), slots=8192, codec="int4", group=32),
        dict(name="smollm2_8k_5_queries", lengths=(8192,), slots=8192, queries=5),
        dict(name="smollm2_8k_pages_of_16", lengths=(8192,), slots=8192, page=16),
        dict(name="smollm2_ring_512_4_sinks", lengths=(2048,), window=512, sinks=4, ring=True),
        dict(name="llama8b_2k_8_rows", lengths=(2048,) * 8, slots=2048, heads=32, kv_heads=8, width=128, layers=1),
    )
)
"""A layer's part of a decoding step, as the benchmark times it."""
