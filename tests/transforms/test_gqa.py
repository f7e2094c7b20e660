"""gqa: heads pooled by their mean, against numpy; the first and random ones; where it loses nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_first_heads_of_each_group_are_kept_to_the_bit(kv_heads: int) -> None:
    model = ip.gqa(kv_heads, init="first")(BARE)
    before, after = Weights.of(BARE.spec, PARAMS), Weights.of(model.spec, model.convert(PARAMS))
    rows = [4 * head + row for head in range(0, 4, 4 // kv_heads) for row in range(4)]
    for name in before:
        kept = before[name][np.array(rows)] if name.endswith((".attn.k", ".attn.v")) else before[name]
        np.testing.assert_array_equal(after[name], kept)


def test_random_heads_are_a_function_of_the_seed_and_of_the_old_ones_size_alone() -> None:
    def heads(seed: int | None, scale: float = 1.0) -> dict[str, np.ndarray]:
        model = ip.gqa(2, init="random", seed=seed)(BARE)
        params = jax.tree.map(lambda x: scale * x, PARAMS)
        found = Weights.of(model.spec, model.convert(params))
        return {n: np.asarray(found[n]) for n in found if n.endswith((".attn.k", ".attn.v"))}

    zero, one, twice, before = heads(0), heads(1), heads(None, 2.0), Weights.of(BARE.spec, PARAMS)
    assert len({x.tobytes() for x in (*zero.values(), *one.values())}) == 2 * len(zero) == 8, "no two alike"
    for name, x in zero.items():
        np.testing.assert_allclose(twice[name], 2 * x, rtol=1e-6)
        old = np.asarray(before[name])
        assert x.std() / old.std() == pytest.approx(1, abs=0.3)
        assert abs(np.corrcoef(x.ravel(), old[:8].ravel())[0, 1]) < 0.4


def equal_in_groups(model: ip.Model, kv_heads: int) -> Any:
    """Params whose key/value heads are the same in each group, and whose biases are not 0."""

    def equal(path: Any, x: jax.Array) -> jax.Array:
        name = path[-1].key
        if "bias" in name:
            x = x + jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        if name not in ("attn.k", "attn.v", "attn.k_bias", "attn.v_bias"):
            return x
        c = model.spec.config
        heads = x.reshape(len(x), kv_heads, c.kv_heads // kv_heads, c.head_dim, -1)
        return jnp.broadcast_to(heads[:, :, :1], heads.shape).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(equal, model.init(jax.random.key(1)))


FAMILIES = {"llama": BARE} | {
    name: getattr(ip.models, name)(layers=2, dim=16, heads=4, kv_heads=4, head_dim=4, mlp=16, vocab=29, context=48)
    for name in ("qwen2", "gemma3")
}


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("qwen2", 1), ("gemma3", 2)])
def test_heads_that_are_equal_in_groups_are_pooled_without_loss(family: str, kv_heads: int) -> None:
    model, tokens = FAMILIES[family], jnp.arange(12).reshape(1, 12)
    params = equal_in_groups(model, kv_heads)
    small = ip.gqa(kv_heads)(model)
    run = jax.jit(small.apply)
    want = model.apply(params, tokens)[0]
    pooled = [ip.gqa(kv_heads, init)(model).convert(params) for init in ("mean", "first", "random")]
    mean, first, random = (float(jnp.abs(run(p, tokens)[0] - want).max() / jnp.std(want)) for p in pooled)
    assert mean < 1e-5 and first < 1e-5 and random > 1e-2


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (ip.gqa(1), "gqa(kv_heads=1)"),
        (ip.gqa(1, init="first"), "gqa(kv_heads=1, init='first')"),
        (ip.gqa(1, init="random"), "gqa(kv_heads=1, init='random', seed=0)"),
        (ip.gqa(1, init="random", seed=7), "gqa(kv_heads=1, init='random', seed=7)"),
    ],
)
def test_how_heads_begin_stands_in_the_recipe_and_is_read_back(transform: ip.Transform, text: str) -> None:
    assert str(transform(BARE).recipe) == repr(transform) == text
    assert ip.parse_stack(text) == transform


@pytest.mark.parametrize(
    ("given", "said", "fix"),
    [
        (dict(init="median"), "init='median'", "'mean', 'first' or 'random'"),
        (dict(init=None), "init=None", "'mean', 'first' or 'random'"),
        (dict(init="first", seed=1), "takes no seed", "init='random'"),
        (dict(init="random", seed=-1), "seed=-1", "seed="),
    ],
)
def test_a_beginning_that_is_none_is_refused(given: dict[str, Any], said: str, fix: str) -> None:
    with pytest.raises(InfoptError, match=said) as e:
        ip.gqa(1, **given)
    assert fix in e.value.fix


@pytest.mark.parametrize("init", ["mean", "first", "random"])
def test_as_many_heads_as_before_is_the_identity(init: str) -> None:
    model = ip.gqa(4, init)(BARE)
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
