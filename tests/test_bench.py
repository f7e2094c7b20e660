"""The benchmark measures what it says: its yardstick is the same model, written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import bench, timing


@pytest.mark.parametrize("product", ["x @ w.T", "einsum"])
def test_the_yardstick_writes_what_generate_writes(product: str) -> None:
    model = ip.models.llama(layers=2, dim=32, heads=4, kv_heads=2, vocab=61, context=160, tied=False)
    params = model.init(jax.random.key(2))
    prompt = np.random.default_rng(0).integers(0, 61, 9).astype(np.int32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as one writes by hand
        prefill, decode = bench.yardstick(model, params, len(prompt) + bench.NEW, product)
        cache, _ = prefill(params, jnp.asarray(prompt[:-1]))
        by_hand = decode(params, cache, jnp.asarray(prompt[-1]), jnp.int32(len(prompt) - 1))
    fast = ip.cache_kv()(model)
    out = ip.generate(fast, fast.convert(params), prompt.tolist(), max_new=bench.NEW)
    assert by_hand.tolist() == out.tokens


def test_other_models_have_no_yardstick() -> None:
    model = ip.models.gemma3()
    with pytest.raises(ip.InfoptError, match="bare llama"):
        bench.yardstick(model, model.init(jax.random.key(0)), 16)


def test_a_median_is_over_the_runs_after_the_first() -> None:
    seconds = iter([9.0, 1.0, 2.0, 6.0])
    assert timing.interleaved({"a": lambda: next(seconds)}, 3) == {"a": 2.0}
