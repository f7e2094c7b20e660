"""Transform and compose: order, recipe, refusals, and transforms of one's own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

import jax
import numpy as np
import pytest

import infopt as ip
from infopt import testing
from infopt.errors import InfoptError, TransformOrderError
from infopt.model import Model, Weights
from infopt.spec import Spec
from infopt.transforms.base import Transform

TINY = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16, "vocab": 29, "context": 48}
BARE = ip.models.llama(**TINY, tied=False)


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Louder(Transform):
    """A user's own: every feed-forward output is multiplied."""

    name: ClassVar[str] = "louder"
    by: float = 2.0

    @property
    def exact(self) -> bool:
        return False

    def check(self, spec: Spec) -> None:
        pass

    def edit(self, spec: Spec) -> Spec:
        return spec

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        names = [n for n in weights if n.endswith(".mlp.down")]
        return weights.map(names, lambda _, w: w * self.by)


def test_compose_and_the_bar_apply_the_first_listed_first() -> None:
    a, b, c = ip.gqa(1), ip.sliding_window(8), ip.cache_kv()
    assert ip.compose(a, b, c) == a | b | c == a | (b | c) == ip.compose(ip.compose(a, b), c)
    model = (a | b | c)(BARE)
    assert model == c(b(a(BARE)))
    assert [text for text, _ in model.recipe.steps] == ["gqa(kv_heads=1)", "sliding_window(size=8)", "cache_kv()"]
    assert str(model.recipe) == repr(a | b | c) == "gqa(kv_heads=1) | sliding_window(size=8) | cache_kv()"


def test_an_empty_compose_changes_nothing() -> None:
    assert ip.compose()(BARE) is BARE
    assert repr(ip.compose()) == "compose()"
    assert ip.compose().exact


def test_a_stack_is_exact_if_each_of_its_transforms_is() -> None:
    assert (ip.cache_kv() | ip.paged(4)).exact
    assert (ip.cache_kv() | ip.paged(4))(BARE).exact
    assert not (ip.cache_kv(bits=8) | ip.paged(4)).exact
    assert not (ip.quantize(bits=8) | ip.dequantize())(BARE).exact


@pytest.mark.parametrize("wrong", [ip.cache_kv, 3, None, "cache_kv()", BARE], ids=lambda w: type(w).__name__)
def test_compose_takes_transforms_only(wrong: Any) -> None:
    with pytest.raises(InfoptError, match="not a transform"):
        ip.compose(ip.gqa(1), wrong)
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = ip.gqa(1) | wrong


def test_a_factory_that_was_not_called_is_told_so() -> None:
    with pytest.raises(InfoptError) as e:
        ip.compose(ip.cache_kv)  # type: ignore[arg-type]
    assert e.value.fix == "call the factory: cache_kv(), not cache_kv"


def test_a_refusal_says_what_why_and_what_to_write() -> None:
    with pytest.raises(TransformOrderError) as e:
        ip.paged(4)(BARE)
    what, why, fix = str(e.value).split("\n")
    assert what == "paged(page=4) needs a cache, and there is none yet."
    assert why.startswith("  why: ")
    assert fix == "  fix: cache_kv() | paged(page=4)"
    assert "\n" not in e.value.one_line
    assert all(part in e.value.one_line for part in ("needs a cache", "; why: ", "; fix: cache_kv() |"))


def test_compose_checks_in_order() -> None:
    (ip.cache_kv() | ip.paged(4)).check(BARE.spec)
    with pytest.raises(TransformOrderError):
        (ip.paged(4) | ip.cache_kv()).check(BARE.spec)
    with pytest.raises(TransformOrderError):
        (ip.paged(4) | ip.cache_kv())(BARE)


@pytest.mark.parametrize("late", [t for t in testing.EXAMPLES if t.name != "dequantize"], ids=repr)
def test_nothing_follows_speculative(late: Transform) -> None:
    model = (ip.cache_kv() | ip.speculative(ip.self_draft(), k=2))(BARE)
    with pytest.raises(TransformOrderError, match="must come before speculative") as e:
        late(model)
    assert repr(late) in e.value.what
    assert "speculative(...)" in e.value.fix
    with pytest.raises(TransformOrderError, match="outermost"):
        Louder()(model)  # nor one that has never heard of it


def test_transforms_are_hashable_values() -> None:
    assert ip.quantize(bits=4, group=32) == ip.quantize(group=32, bits=4)
    assert len({ip.gqa(1), ip.gqa(1), ip.gqa(2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        ip.gqa(1).kv_heads = 2  # type: ignore[misc]


def test_a_tokenizer_is_kept_by_every_transform() -> None:
    model = dataclasses.replace(BARE, tokenizer="words")
    for t in (ip.gqa(1), ip.quantize(bits=8), ip.sliding_window(8), ip.cache_kv(), ip.paged(4), ip.dequantize()):
        model = t(model)
        assert model.tokenizer == "words"


def test_a_transform_of_ones_own_stacks_and_converts() -> None:
    params = BARE.init(jax.random.key(0))
    model = (Louder(3.0) | ip.quantize(bits=8, where="*.mlp.up") | ip.cache_kv())(BARE)
    assert str(model.recipe).startswith("louder(by=3.0) | quantize(")
    assert repr(Louder()) == "louder()"
    got = model.convert(params)["segments"][0][0]["mlp.down"]
    np.testing.assert_allclose(got, 3 * np.asarray(params["segments"][0][0]["mlp.down"]), rtol=1e-6)


def test_a_whole_number_is_asked_for_by_name() -> None:
    for make, name in (
        (lambda x: ip.gqa(x), "kv_heads"),
        (lambda x: ip.paged(x), "page"),
        (lambda x: ip.sliding_window(x), "size"),
        (lambda x: ip.speculative(ip.self_draft(), k=x), "k"),
    ):
        for bad in (0, -1, 2.0, True, "2", None):
            with pytest.raises(InfoptError, match=f"{name}=.* is not a whole number >= 1") as e:
                make(bad)
            assert e.value.fix
