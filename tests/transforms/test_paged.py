"""paged: the same numbers, found through a table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import TransformOrderError

BARE = ip.models.llama(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 16)), jnp.int32)


def run(model: ip.Model, tables=lambda t: t) -> np.ndarray:
    """Logits in chunks of three, the rows out of step."""
    step, state = jax.jit(model.apply), model.init_state(2, 14, chunk=3)
    state = state.replace(tables=tables(state.tables))
    out = []
    for turn in range(5):
        start = int(state.lengths[0])
        count = jnp.asarray([3, turn % 4], jnp.int32)
        logits, state = step(PARAMS, TOKENS[:, start : start + 3], state, count)
        out.append(np.asarray(logits) * (np.arange(3)[None, :, None] < np.asarray(count)[:, None, None]))
    return np.stack(out)


@pytest.mark.parametrize(
    "cached", [ip.cache_kv(bits=8), ip.sliding_window(4, sinks=1) | ip.cache_kv()], ids=["linear", "ring"]
)
def test_paged_equals_unpaged_bit_for_bit_whatever_the_pages_order(cached: ip.Transform) -> None:
    """Pages of 4 do not divide the 14 slots, nor the ring's 7."""
    plain, paged = cached(BARE), (cached | ip.paged(4))(BARE)
    want = run(plain)
    np.testing.assert_array_equal(run(paged), want)

    def shuffled(tables: tuple) -> tuple:
        (table,) = tables
        order = np.random.default_rng(1).permutation(table.size)
        return (jnp.asarray(order.reshape(table.shape), jnp.int32),)

    np.testing.assert_array_equal(run(paged, shuffled), want)


def test_it_edits_the_page_only_and_is_exact() -> None:
    spec = ip.cache_kv()(BARE).spec
    assert ip.paged(4).edit(spec) == spec.replace(page=4)
    assert ip.paged().edit(spec).page == 16
    assert ip.paged(4).exact


def test_without_a_cache_it_is_refused() -> None:
    with pytest.raises(TransformOrderError, match="needs a cache") as e:
        ip.paged(4)(BARE)
    assert e.value.why
    assert e.value.fix == "cache_kv() | paged(page=4)"


def test_pages_twice_are_refused() -> None:
    with pytest.raises(TransformOrderError, match="pages of 4 already") as e:
        (ip.cache_kv() | ip.paged(4) | ip.paged(8))(BARE)
    assert e.value.why
    assert e.value.fix


def test_every_row_owns_its_pages_and_the_last_may_be_partial() -> None:
    state = (ip.cache_kv() | ip.paged(4))(BARE).init_state(3, 10)
    assert np.asarray(state.tables[0]).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert jax.tree.leaves(state.kv)[0].shape == (1, 36, 8)


def test_layers_of_other_windows_have_tables_of_their_own() -> None:
    model = ip.models.gemma3(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, vocab=29, pattern=(True, False))
    state = (ip.cache_kv() | ip.paged(4))(model).init_state(1, 40, chunk=5)
    assert [t.shape for t in state.tables] == [(1, 3), (1, 10)]
