"""sliding_window: who is seen, which layers, and what is narrower stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.masks import allowed, sink_query_position
from infopt.model import Weights
from infopt.reference import reference
from infopt.spec import Window

BARE = ip.models.llama(layers=3, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(0, 29, (1, 12))


def logits(model: ip.Model) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(PARAMS, jnp.asarray(TOKENS, jnp.int32))[0])


@pytest.mark.parametrize("window", [None, Window(1), Window(4), Window(4, 2), Window(3, 3)], ids=str)
def test_a_position_sees_the_last_few_and_the_first_few(window: Window | None) -> None:
    at = jnp.arange(12, dtype=jnp.int32)[None]
    keys = jnp.concatenate([at, jnp.full((1, 2), -1, jnp.int32)], 1)
    got = np.asarray(allowed(at, keys, window))[0]
    for q in range(12):
        want = set(range(q + 1))
        if window is not None:
            want = {k for k in want if q - k < window.size or k < window.sinks}
        assert set(np.flatnonzero(got[q])) == want


def test_a_sink_is_looked_at_from_no_further_than_the_window_is_long() -> None:
    at = jnp.asarray([[0, 2, 3, 4, 50]], jnp.int32)
    assert np.asarray(sink_query_position(at, Window(4, 2)))[0].tolist() == [0, 2, 3, 3, 3]


def test_a_window_as_long_as_the_text_changes_nothing() -> None:
    want = logits(BARE)
    for window in (ip.sliding_window(12), ip.sliding_window(12, sinks=3)):
        np.testing.assert_allclose(logits(window(BARE)), want, atol=1e-6)


def test_a_window_one_shorter_than_the_text_changes_its_last_position_only() -> None:
    model = ip.sliding_window(11)(BARE)
    got, want = logits(model), logits(BARE)
    np.testing.assert_allclose(got[:, :11], want[:, :11], atol=1e-6)
    assert np.abs(got[:, 11] - want[:, 11]).max() > 1e-3
    np.testing.assert_allclose(got[0], reference(model.spec, Weights.of(model.spec, PARAMS), TOKENS[0]), atol=1e-4)


def test_it_edits_the_windows_of_its_layers_only() -> None:
    spec = ip.sliding_window(8, sinks=2, layers=[0, 2])(BARE).spec
    assert spec.window == (Window(8, 2), None, Window(8, 2))
    assert spec.replace(window=BARE.spec.window) == BARE.spec
    assert ip.sliding_window(8)(BARE).spec.window == (Window(8),) * 3
    assert not ip.sliding_window(8).exact


def test_a_layer_keeps_the_narrower_window_and_the_more_sinks() -> None:
    both = (ip.sliding_window(8, sinks=3) | ip.sliding_window(5, sinks=1) | ip.sliding_window(9, layers=[1]))(BARE)
    assert both.spec.window == (Window(5, 3),) * 3
    a, b = ip.sliding_window(8, sinks=3), ip.sliding_window(5, sinks=1, layers=[2])
    assert (a | b)(BARE).spec == (b | a)(BARE).spec
    gemma = ip.models.gemma3(layers=6, window=8)
    assert ip.sliding_window(16)(gemma).spec.window == (Window(8),) * 5 + (Window(16),)


def test_layers_are_a_set() -> None:
    assert ip.sliding_window(8, layers=[2, 0, 2]) == ip.sliding_window(8, layers=(0, 2))


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InfoptError, match="no layer 3") as e:
        ip.sliding_window(8, layers=[1, 3])(BARE)
    assert e.value.fix == "layers from 0 to 2"


def test_sinks_wider_than_a_layers_own_window_are_refused() -> None:
    with pytest.raises(InfoptError, match="layer 0 would see 3 positions and keep 5 sinks") as e:
        (ip.sliding_window(3) | ip.sliding_window(8, sinks=5))(BARE)
    assert e.value.fix == "sinks <= 3"
    assert e.value.why


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 4, "sinks": -1}, "sinks=-1"),
        ({"size": 4, "sinks": 5}, "more sinks than it sees"),
        ({"size": 4, "layers": []}, "names no layer"),
        ({"size": 4, "layers": [-1]}, "layers=-1"),
        ({"size": 4, "layers": 1.5}, "layers=1.5"),
        ({"size": 4, "layers": "02"}, "layers='02'"),
        ({"size": 4, "layers": [0.5]}, "layers=0.5"),
        ({"size": 4, "layers": 1}, "layers"),
    ],
    ids=str,
)
def test_a_window_that_cannot_be_is_refused(args: dict, says: str) -> None:
    with pytest.raises(InfoptError, match=says) as e:
        ip.sliding_window(**args)
    assert e.value.fix
