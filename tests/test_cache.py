"""Layouts, writes that fall outside, and rollback: what keeps a cache exact."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import cache
from infopt.cache import Layout, rollback
from infopt.errors import InfoptError, PromptError
from infopt.model import Weights
from infopt.qtensor import Format
from infopt.reference import reference
from infopt.spec import Codec, Window

LONGEST = 40

LAYOUTS = {
    "linear": Layout(LONGEST),
    "linear-window": Layout(LONGEST, Window(6)),
    "ring": Layout.plan(Window(6), 64, 3, None),
    "ring-of-one": Layout.plan(Window(1), 64, 1, None),
    "ring-sinks": Layout.plan(Window(5, 2), 64, 4, None),
    "ring-all-sinks": Layout.plan(Window(3, 3), 64, 1, None),
}


def slots_of(layout: Layout) -> np.ndarray:
    return np.asarray(layout.slot(jnp.arange(LONGEST, dtype=jnp.int32)))


def positions_of(layout: Layout) -> np.ndarray:
    """For each length up to the longest, the position that each slot is said to hold."""
    return np.asarray(layout.positions(jnp.arange(LONGEST + 1, dtype=jnp.int32)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_slots_and_positions_are_inverse_at_every_length(name: str) -> None:
    """Written one after another, the slots hold what `positions` derives from the length alone."""
    layout = LAYOUTS[name]
    slot, positions = slots_of(layout), positions_of(layout)
    assert slot.max() < layout.slots
    assert positions.shape == (LONGEST + 1, layout.slots)
    held = np.full(layout.slots, -1)
    for length in range(LONGEST + 1):
        np.testing.assert_array_equal(positions[length], held)
        if length < LONGEST:
            held[slot[length]] = length


def missing(layout: Layout, window: Window, lookahead: int, seed: int = 0) -> int:
    """Keys that a query needs and does not find, over random appends and rollbacks within the lookahead."""
    slot, positions = slots_of(layout), positions_of(layout)
    rng = np.random.default_rng(seed)
    held, length, peak, lost = np.full(layout.slots, -1), 0, 0, 0
    for turn in range(200):
        n = min(int(rng.integers(1, lookahead + 1)) if turn % 2 else lookahead, LONGEST - length)
        for p in range(length, length + n):
            held[slot[p]] = p
        for query in range(length, length + n):
            for key in range(query + 1):
                if key > query - window.size or key < window.sinks:
                    s = slot[key]
                    lost += not (held[s] == key and positions[length + n, s] == key)
        length, peak = length + n, max(peak, length + n)
        if rng.random() < 0.6 or length == LONGEST:
            back = int(rng.integers(0, lookahead - (peak - length) + 1))
            length -= min(back, length)
        if length == LONGEST:  # a new row
            held, length, peak = np.full(layout.slots, -1), 0, 0
    return lost


RINGS = [(Window(1), 1), (Window(6), 1), (Window(6), 4), (Window(5, 2), 3), (Window(4, 4), 5)]


@pytest.mark.parametrize(("window", "lookahead"), RINGS, ids=str)
def test_a_ring_of_window_sinks_and_lookahead_minus_one_slots_is_exact(window: Window, lookahead: int) -> None:
    layout = Layout.plan(window, 64, lookahead, None)
    assert layout.slots == window.size + window.sinks + lookahead - 1
    assert missing(layout, window, lookahead) == 0


@pytest.mark.parametrize(("window", "lookahead"), RINGS[1:], ids=str)
def test_a_ring_one_slot_smaller_loses_keys(window: Window, lookahead: int) -> None:
    layout = Layout.plan(window, 64, lookahead, None)
    assert missing(dataclasses.replace(layout, slots=layout.slots - 1), window, lookahead) > 0


def lost_in_groups(layout: Layout, window: Window | None, lookahead: int, tail: int, seed: int = 0) -> int:
    """Of groups that are rounded late: tokens that a query needs, rounded or as computed, or a group, and not finds."""
    group, recent = layout.group, layout.recent
    assert recent is not None
    slot, place = slots_of(recent), slots_of(layout)
    said, said_recent = positions_of(layout), positions_of(recent)
    rng = np.random.default_rng(seed)
    length = peak = lost = 0
    held, whole = np.full(recent.slots, -1), np.full(layout.slots, -1)
    for turn in range(200):
        n = min(int(rng.integers(1, lookahead + 1)) if turn % 2 else lookahead, LONGEST - length)
        before, length = length, length + n
        for p in range(before, length):
            held[slot[p]] = p
        for g in range(before // group, length // group):
            lost += sum(held[slot[p]] != p for p in range(g * group, (g + 1) * group))
            whole[place[g]] = g
        for query in range(before, length):
            for key in range(query + 1):
                if window is None or key > query - window.size or key < window.sinks:
                    g = key // group
                    if (g + 1) * group + tail <= query + 1:
                        at = place[g] * group + key % group
                        lost += not (whole[place[g]] == g and said[length, at] == key)
                    else:
                        lost += not (held[slot[key]] == key and said_recent[length, slot[key]] == key)
        peak = max(peak, length)
        if rng.random() < 0.6 or length == LONGEST:
            length -= min(int(rng.integers(0, lookahead - (peak - length) + 1)), length)
        if length == LONGEST:
            length = peak = 0
            held, whole = np.full(recent.slots, -1), np.full(layout.slots, -1)
    return lost


GROUPS = [
    (None, 4, 4, 3), (None, 1, 4, 0), (None, 7, 3, 1),
    (Window(6), 4, 4, 3), (Window(9), 3, 2, 0), (Window(12, 5), 5, 4, 2),
]  # fmt: skip
"""Window, lookahead, tokens a group, tail."""


@pytest.mark.parametrize(("window", "lookahead", "group", "tail"), GROUPS, ids=str)
def test_groups_and_their_ring_hold_what_late_rounding_needs_and_no_slot_more(window, lookahead, group, tail) -> None:
    codec = Codec(Format("int8"), split=group, tail=tail)
    layout = Layout.plan(window, 4 * LONGEST, lookahead, None, codec)
    recent = layout.recent
    assert recent is not None
    assert recent.slots == group + max(tail, 1) + (window.sinks if window else 0) + lookahead - 2
    assert lost_in_groups(layout, window, lookahead, tail) == 0
    short = dataclasses.replace(recent, slots=recent.slots - 1)
    assert lost_in_groups(dataclasses.replace(layout, recent=short), window, lookahead, tail) > 0
    if window is not None:
        assert layout.slots == -(-(window.size + lookahead - 1) // group) + -(-window.sinks // group)
        assert lost_in_groups(dataclasses.replace(layout, slots=layout.slots - 1), window, lookahead, tail) > 0


def test_a_rollback_one_beyond_the_lookahead_would_lose_a_key() -> None:
    layout, window = Layout.plan(Window(6), 64, 3, None), Window(6)
    slot = slots_of(layout)

    def lost_after(back: int) -> int:
        held = np.full(layout.slots, -1)
        for p in range(20):
            held[slot[p]] = p
        query = 20 - back
        held[slot[query]] = query
        return sum(held[slot[k]] != k for k in range(query - window.size + 1, query + 1))

    assert [lost_after(n) for n in range(6)] == [0, 0, 0, 0, 1, 2]


def test_layout_is_a_ring_only_where_that_is_shorter_than_the_text() -> None:
    assert Layout.plan(None, 40, 5, None) == Layout(40)
    assert Layout.plan(Window(8), 40, 5, None) == Layout(12, Window(8), 5)
    assert Layout.plan(Window(8, 2), 40, 5, 4) == Layout(14, Window(8, 2), 5, 4)
    assert Layout.plan(Window(8), 12, 5, None) == Layout(12, Window(8))  # no shorter: linear, no lookahead
    assert Layout.plan(Window(8), 13, 5, None).lookahead == 5


# ---------------------------------------------------------------------------------------------------- single writes


def wrote(layout: Layout, table, positions: list[list[int]], keep: list[list[bool]]) -> np.ndarray:
    """Slots `[B, S]` (or the pool) after writing 1000 + 100 * row + position where there was -1."""
    at = np.asarray(positions, np.int32)
    batch = at.shape[0]
    place = (batch, layout.slots) if layout.page is None else (batch * layout.pages * layout.page,)
    old = jnp.full((1, *place, 1), -1.0)
    values = 1000 + 100 * np.arange(batch)[:, None] + at
    new = jnp.asarray(values[..., None], jnp.float32)
    table = None if table is None else jnp.asarray(table, jnp.int32)
    out = cache.write(old, new, jnp.int32(0), layout, table, jnp.asarray(at), jnp.asarray(keep))
    return np.asarray(out)[0, ..., 0]


def test_linear_write_past_the_end_is_dropped() -> None:
    got = wrote(Layout(4), None, [[2, 3, 4, 5, 6], [0, 1, 2, 3, 9]], [[True] * 5] * 2)
    np.testing.assert_array_equal(got, [[-1, -1, 1002, 1003], [1100, 1101, 1102, 1103]])


def test_write_that_is_not_kept_is_dropped_in_a_ring() -> None:
    layout = Layout.plan(Window(3), 64, 2, None)
    got = wrote(layout, None, [[4, 5], [6, 7]], [[True, False], [False, False]])
    np.testing.assert_array_equal(got, [[1004, -1, -1, -1], [-1] * 4])


def test_paged_write_goes_through_the_table_and_an_unallocated_page_drops_it() -> None:
    layout = Layout(6, page=2)
    got = wrote(layout, [[4, -1, 0], [-1, 1, 2]], [[0, 1, 2, 3, 4, 5]] * 2, [[True] * 6] * 2)
    want = np.full(12, -1.0)
    want[[8, 9, 0, 1]] = 1000, 1001, 1004, 1005
    want[[2, 3, 4, 5]] = 1102, 1103, 1104, 1105
    np.testing.assert_array_equal(got, want)


def test_paged_write_past_the_end_is_dropped_also_inside_the_last_page() -> None:
    layout = Layout(5, page=4)  # two pages, of whose eight places five are slots
    got = wrote(layout, [[0, 1], [2, 3]], [[4, 5, 6, 7, 8], [3, 4, 5, 40, 2**20]], [[True] * 5] * 2)
    want = np.full(16, -1.0)
    want[4], want[8 + 3], want[8 + 4] = 1004, 1103, 1104
    np.testing.assert_array_equal(got, want)


def test_reading_an_unallocated_page_gives_zeros_and_no_other_row() -> None:
    layout = Layout(4, page=2)
    pool = jnp.arange(8, dtype=jnp.float32).reshape(1, 8, 1) + 1
    got = cache.read(pool, jnp.int32(0), layout, jnp.asarray([[3, -1], [-1, 0]], jnp.int32))
    np.testing.assert_array_equal(np.asarray(got)[..., 0], [[7, 8, 0, 0], [0, 0, 1, 2]])


def test_a_cache_with_a_codec_is_written_and_read_leaf_by_leaf() -> None:
    layout, codec = Layout(4), Format("int8")
    empty = cache.empty(layout, 2, 1, 1, 8, codec, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 8)), jnp.float32)
    at = jnp.asarray([[2]], jnp.int32)
    full = cache.write(empty, cache.encode(x, codec), jnp.int32(1), layout, None, at, jnp.ones((1, 1), bool))
    got = np.asarray(cache.decode(cache.read(full, jnp.int32(1), layout, None), 1, jnp.float32))
    np.testing.assert_allclose(got[0, 2], np.asarray(x)[0, 0], atol=0.02)
    assert not got[0, [0, 1, 3]].any()
    assert not np.asarray(cache.decode(cache.read(full, jnp.int32(0), layout, None), 1, jnp.float32)).any()


# ------------------------------------------------------------------------------------------------------ whole models

BASE = ip.models.llama(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=32, tied=False)
STACKS = {
    "linear": ip.cache_kv(),
    "ring": ip.sliding_window(4, sinks=1) | ip.cache_kv(bits=8),
    "paged": ip.cache_kv() | ip.paged(4),
}
MAX_LEN, CHUNK = 14, 3


@functools.cache
def stack(name: str):
    model = STACKS[name](BASE)
    return model, model.init(jax.random.key(0)), jax.jit(model.apply)


def feed(name: str, state, tokens, count):
    _, params, step = stack(name)
    return step(params, jnp.asarray(tokens, jnp.int32), state, jnp.asarray(count, jnp.int32))


def filled(name: str, lengths: tuple[int, int]):
    """A state of two rows of these lengths, and the rows."""
    model = stack(name)[0]
    rows = np.random.default_rng(2).integers(0, 29, (2, MAX_LEN + 4))
    state, at = model.init_state(2, MAX_LEN, chunk=CHUNK), np.zeros(2, int)
    while (at < lengths).any():
        count = np.minimum(CHUNK, lengths - at)
        tokens = np.stack([rows[b, a : a + CHUNK] for b, a in enumerate(at)])
        _, state = feed(name, state, tokens, count)
        at += count
    return state, rows


def of_row(state, b: int) -> list[np.ndarray]:
    """Every bit that belongs to a row."""
    batch = state.batch
    kv = [np.asarray(leaf) for leaf in jax.tree.leaves(state.kv)]
    if state.tables:
        kv = [leaf.reshape(leaf.shape[0], batch, -1, *leaf.shape[2:]) for leaf in kv]
    return [np.asarray(x)[b] for x in (state.lengths, state.peak, state.tokens)] + [leaf[:, b] for leaf in kv]


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", STACKS)
def test_a_row_with_count_zero_is_untouched_bit_for_bit(name: str) -> None:
    state, _ = filled(name, (10, 7))
    before = of_row(state, 1)
    _, state = feed(name, state, [[1, 2, 3], [4, 5, 6]], [3, 0])
    assert same_bits(before, of_row(state, 1))
    assert np.asarray(state.lengths).tolist() == [13, 7]


@pytest.mark.parametrize("name", STACKS)
def test_tokens_past_the_end_of_the_state_are_dropped_and_touch_no_other_row(name: str) -> None:
    state, _ = filled(name, (MAX_LEN, 3))
    mine, other = of_row(state, 0), of_row(state, 1)
    _, state = feed(name, state, [[1, 2, 3], [4, 5, 6]], [3, 0])
    assert same_bits(mine, of_row(state, 0))
    assert same_bits(other, of_row(state, 1))
    state, _ = filled(name, (MAX_LEN - 1, 3))
    other = of_row(state, 1)
    _, state = feed(name, state, [[1, 2, 3], [4, 5, 6]], [3, 0])
    assert np.asarray(state.lengths).tolist() == [MAX_LEN, 3]
    assert np.asarray(state.tokens)[0, -1] == 1
    assert same_bits(other, of_row(state, 1))


def test_a_page_that_is_taken_away_changes_its_row_only() -> None:
    state, rows = filled("paged", (9, 9))
    good, _ = feed("paged", state, rows[:, 9:12], [3, 3])
    table = np.array(state.tables[0])
    table[0, 2] = -1
    bad, after = feed("paged", state.replace(tables=(jnp.asarray(table),)), rows[:, 9:12], [3, 3])
    assert not np.array_equal(np.asarray(bad)[0], np.asarray(good)[0])
    np.testing.assert_array_equal(np.asarray(bad)[1], np.asarray(good)[1])
    _, want = feed("paged", state, rows[:, 9:12], [3, 3])
    assert same_bits(of_row(after, 1)[3:], of_row(want, 1)[3:])


@pytest.mark.parametrize("name", STACKS)
def test_rollback_within_the_lookahead_is_exact(name: str) -> None:
    """Other tokens are read, taken back, and leave no trace: logits equal the numpy model's."""
    model, params, _ = stack(name)
    state, rows = filled(name, (10, 8))
    _, state = feed(name, state, [[7, 7, 7], [8, 8, 8]], [3, 3])
    state = rollback(state, jnp.asarray([3, 3], jnp.int32))
    tokens = np.stack([rows[0, 10:13], rows[1, 8:11]])
    logits, state = feed(name, state, tokens, [3, 3])
    weights = Weights.of(model.spec, params)
    for b, start in enumerate((10, 8)):
        want = reference(ip.oracle(model.spec), weights, rows[b, : start + 3])[start:]
        np.testing.assert_allclose(np.asarray(logits)[b], want, atol=2e-4)
    assert np.asarray(state.lengths).tolist() == [13, 11]


def test_rollback_beyond_the_lookahead_is_refused() -> None:
    state, _ = filled("ring", (12, 9))
    assert state.lookahead == CHUNK
    with pytest.raises(InfoptError, match="look ahead 3") as e:
        rollback(state, 4)
    assert "silently wrong" in e.value.why
    assert "chunk=4" in e.value.fix
    assert "at most 3" in e.value.fix
    assert np.asarray(rollback(state, 3).lengths).tolist() == [9, 6]


def test_two_rollbacks_in_a_row_add_up() -> None:
    state, _ = filled("ring", (12, 9))
    once = rollback(state, 2)
    with pytest.raises(InfoptError, match="at most 1"):
        rollback(once, 2)
    assert np.asarray(rollback(once, 1).lengths).tolist() == [9, 6]
    with pytest.raises(InfoptError):
        rollback(rollback(once, 1), 1)


def test_reading_again_after_a_rollback_does_not_restore_what_may_be_taken_back() -> None:
    """The ring remembers from the greatest length on, so one token read again gives one more to take back."""
    state, rows = filled("ring", (12, 9))
    state = rollback(state, 3)
    _, state = feed("ring", state, np.stack([rows[0, 9:12], rows[1, 6:9]]), [1, 1])
    assert np.asarray(rollback(state, 1).lengths).tolist() == [9, 6]
    with pytest.raises(InfoptError):
        rollback(state, 2)


def test_rollback_by_row_and_without_a_ring() -> None:
    state, _ = filled("ring", (12, 9))
    assert np.asarray(rollback(state, jnp.asarray([0, 3], jnp.int32)).lengths).tolist() == [12, 6]
    with pytest.raises(InfoptError):
        rollback(state, jnp.asarray([0, 4], jnp.int32))
    state, _ = filled("linear", (12, 9))
    assert state.lookahead is None
    assert np.asarray(rollback(state, 9).lengths).tolist() == [3, 0]


@pytest.mark.parametrize("n", [-1, 10])
def test_rollback_of_what_a_row_does_not_have_is_refused(n: int) -> None:
    state, _ = filled("linear", (12, 9))
    with pytest.raises(InfoptError, match="cannot take"):
        rollback(state, n)


def test_rollback_inside_jit_is_refused() -> None:
    state, _ = filled("linear", (3, 3))
    with pytest.raises(InfoptError, match="inside jit"):
        jax.jit(lambda s: rollback(s, 1))(state)


def test_rollback_takes_numpy_arrays() -> None:
    state, _ = filled("linear", (12, 9))
    assert np.asarray(rollback(state, np.array([2, 1])).lengths).tolist() == [10, 8]


def test_more_tokens_at_once_than_the_lookahead_are_refused() -> None:
    model, params, _ = stack("ring")
    state = model.init_state(2, MAX_LEN, chunk=CHUNK)
    with pytest.raises(PromptError, match="looks ahead 3") as e:
        model.apply(params, jnp.zeros((2, 4), jnp.int32), state)
    assert "chunk=4" in e.value.fix
    model, params, _ = stack("linear")
    state = model.init_state(2, MAX_LEN, chunk=CHUNK)
    with pytest.raises(PromptError, match=f"state of {MAX_LEN}"):
        model.apply(params, jnp.zeros((2, MAX_LEN + 1), jnp.int32), state)


def test_bytes_of_a_window_stop_growing_with_the_text() -> None:
    model = stack("ring")[0]
    small = jax.eval_shape(lambda: model.init_state(1, 20, chunk=3))
    large = jax.eval_shape(lambda: model.init_state(1, 32, chunk=3))
    assert [x.shape for x in jax.tree.leaves(small.kv)] == [x.shape for x in jax.tree.leaves(large.kv)]
    assert small.layouts[0].slots == 4 + 1 + 3 - 1


def test_pages_of_a_window_follow_the_window() -> None:
    model = (ip.sliding_window(4, sinks=1) | ip.cache_kv() | ip.paged(2))(BASE)
    state = model.init_state(3, 32, chunk=3)
    assert state.tables[0].shape == (3, 4)
    assert np.asarray(state.tables[0]).ravel().tolist() == list(range(12))
    assert jax.tree.leaves(state.kv)[0].shape == (1, 3 * 4 * 2, 8)
