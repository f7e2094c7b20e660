"""dequantize: the values stay, the bytes grow."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import infopt as ip
from infopt import reference
from infopt.model import Weights

BARE = ip.models.llama(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))


@pytest.mark.parametrize("packed", [ip.quantize(bits=8), ip.quantize(bits=4, group=8, where="layers.0.*")], ids=repr)
def test_weights_are_those_that_the_packed_ones_stand_for(packed: ip.Transform) -> None:
    before = packed(BARE)
    after = ip.dequantize()(before)
    low, dense = before.convert(PARAMS), after.convert(PARAMS)
    assert after.spec == BARE.spec
    packed_weights = Weights.of(before.spec, low)
    for name, got in Weights.of(after.spec, dense).items():
        np.testing.assert_allclose(np.asarray(got), reference.dequantize(packed_weights[name]), rtol=1e-6, atol=1e-8)


def test_it_is_exact_and_what_came_before_may_not_be() -> None:
    assert ip.dequantize().exact
    assert not (ip.quantize(bits=8) | ip.dequantize())(BARE).exact


def test_on_dense_weights_it_changes_nothing() -> None:
    model = ip.dequantize()(BARE)
    assert model.spec == BARE.spec
    same = model.convert(PARAMS)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(same)] == [
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)
    ]


def test_afterwards_weights_may_be_rounded_anew() -> None:
    model = (ip.quantize(bits=8) | ip.dequantize() | ip.quantize(bits=4, group=8))(BARE)
    assert model.spec == ip.quantize(bits=4, group=8)(BARE).spec
