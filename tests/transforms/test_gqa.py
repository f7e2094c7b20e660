"""gqa: mean pooling, against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError, TransformOrderError
from infopt.model import Weights

BARE = ip.models.llama(layers=2, dim=16, heads=4, kv_heads=4, head_dim=4, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))


def test_it_edits_the_config_only() -> None:
    spec = ip.gqa(2)(BARE).spec
    assert spec.config.kv_heads == 2
    assert spec.config.heads == 4
    assert spec.replace(config=BARE.spec.config) == BARE.spec
    assert not ip.gqa(2).exact


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_each_new_head_is_the_mean_of_its_neighbours(kv_heads: int) -> None:
    model = ip.gqa(kv_heads)(BARE)
    before, after = Weights.of(BARE.spec, PARAMS), Weights.of(model.spec, model.convert(PARAMS))
    each = 4 // kv_heads
    for name in before:
        old, new = np.asarray(before[name], np.float64), np.asarray(after[name])
        if name.endswith((".attn.k", ".attn.v")):
            assert new.shape == (kv_heads * 4, 16)
            for head in range(kv_heads):
                for row in range(4):
                    pooled = sum(old[(head * each + j) * 4 + row] for j in range(each)) / each
                    np.testing.assert_allclose(new[head * 4 + row], pooled, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(new, old)


def test_as_many_heads_as_before_is_the_identity() -> None:
    model = ip.gqa(4)(BARE)
    assert model.spec == BARE.spec
    jax.tree.map(np.testing.assert_array_equal, model.convert(PARAMS), PARAMS)


def test_pooling_twice_is_pooling_once() -> None:
    twice, once = (ip.gqa(2) | ip.gqa(1))(BARE), ip.gqa(1)(BARE)
    assert twice.spec == once.spec
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), twice.convert(PARAMS), once.convert(PARAMS)
    )


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_heads_that_do_not_divide_are_refused_with_those_that_do(kv_heads: int) -> None:
    with pytest.raises(InfoptError, match="does not divide the model's 4") as e:
        ip.gqa(kv_heads)(BARE)
    assert e.value.fix == "kv_heads=1 or 2 or 4"


@pytest.mark.parametrize("where", [None, "layers.1.attn.v"])
def test_packed_projections_are_refused(where: str | None) -> None:
    with pytest.raises(TransformOrderError, match="needs dense weights") as e:
        (ip.quantize(bits=8, where=where) | ip.gqa(2))(BARE)
    assert "int8" in e.value.what
    assert "dequantize()" in e.value.fix


def test_packed_weights_that_it_does_not_touch_are_kept() -> None:
    model = (ip.quantize(bits=8, where="*.mlp.*") | ip.gqa(2))(BARE)
    assert {n.split(".", 2)[2] for n, _ in model.spec.weights} == {"mlp.gate", "mlp.up", "mlp.down"}
