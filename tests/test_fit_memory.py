"""Weights and a cache within the same bytes: what is counted is what is there, and the best way is the best."""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
import pytest

import infopt as ip
from infopt.errors import EvaluationError, InfoptError, PromptError, TransformOrderError
from infopt.planner import nbytes

TEXT = [n * n % 61 for n in range(300)]
CACHES = ("cache_kv()", "cache_kv(bits=8)", "cache_kv(bits=4)")
OTHERS = ("gqa(kv_heads=1) | cache_kv()", "sliding_window(16, sinks=2) | cache_kv(bits=8)", *CACHES)
Base = tuple[ip.Model, Any]


def cut() -> ip.Windows:
    return ip.windows(TEXT, 32)


@pytest.fixture(scope="module")
def base() -> Base:
    model = ip.models.llama(layers=3, heads=4, kv_heads=2, context=64)
    return model, model.init(jax.random.key(0))


def fit(base: Base, memory: Any, beside: Any = CACHES, context: int = 64, **how: Any) -> ip.Fitted:
    return ip.fit_memory(*base, memory, context, beside, text=cut(), **{"formats": [3, 4, 8]} | how)


def weights_of(base: Base, form: str) -> int:
    return ip.quantize(format=form)(base[0]).weight_bytes()


@pytest.mark.parametrize("beside", [CACHES, OTHERS], ids=["caches", "heads and windows too"])
@pytest.mark.parametrize("spare", [9_300, 15_000, 40_000, 10_000_000])
def test_what_is_counted_is_what_is_there(base: Base, spare: int, beside: tuple[str, ...]) -> None:
    model, params = base
    memory = weights_of(base, "int3") + spare
    found = fit(base, memory, beside)
    stack = found.transform(model)
    live = nbytes(stack.convert(params)) + nbytes(stack.init_state(1, 64, 64).kv)
    assert live == found.best.bytes <= memory
    plan = ip.plan(stack, context=64, chunk=64).account
    assert live == sum(part.bytes for part in (*plan.weights, *plan.cache))


def test_what_both_cost_is_added_up_and_the_truth_is_measured(base: Base) -> None:
    model, params = base
    found = fit(base, weights_of(base, "int4") + 20_000)
    best = found.best
    bare = best.beside(model)
    own = ip.measure(bare, bare.convert(params), cut(), (model, params)).kl.value
    assert best.kl == pytest.approx(own)
    assert best.predicted == own + found.weights.predicted == min(way.predicted for way in found.ways)
    stack = found.transform(model)
    wanted = ip.measure(stack, stack.convert(params), cut(), (model, params)).kl.value
    assert found.actual == pytest.approx(wanted, rel=2e-3)
    assert found.error == pytest.approx(wanted / best.predicted - 1, abs=5e-3)
    assert found.measure(model, params, cut()).kl.value == found.actual
    assert f"measured {wanted:.3g}" in str(found) or f"measured {found.actual:.3g}" in str(found)


def test_the_best_way_is_the_best_of_those_measured_one_by_one(base: Base) -> None:
    memory = weights_of(base, "int4") + 12_000
    together = fit(base, memory, OTHERS)
    alone = []
    for each in OTHERS:
        try:
            alone.append(fit(base, memory, each).best)
        except InfoptError:
            continue
    assert len(alone) > 2
    best = min(alone, key=lambda way: way.predicted)
    assert together.best.beside == best.beside
    assert together.best.predicted == pytest.approx(best.predicted, rel=0.05)  # sensitivities with a cache's rounding


def test_a_longer_context_takes_bits_from_the_weights_or_the_cache(base: Base) -> None:
    memory = weights_of(base, "int8") + base[0].spec.config.context * ip.cache_kv()(base[0]).token_bytes() // 2
    short, long = (fit(base, memory, context=n) for n in (16, 64))
    assert short.best.beside == ip.cache_kv()
    assert long.best.cache < long.ways[0].cache
    assert long.best.predicted > short.best.predicted
    by_memory = [fit(base, memory + more).best.predicted for more in (-6_000, 0, 6_000, 60_000)]
    assert by_memory == sorted(by_memory, reverse=True)
    assert math.isclose(by_memory[-1], short.weights.sensitivity.sums()["int8"], rel_tol=1e-6)  # the cache is free


def test_fewer_heads_are_weights_of_another_shape(base: Base) -> None:
    found = fit(base, 10_000_000, ["cache_kv()", "cache_kv(bits=8)", "gqa(kv_heads=1) | cache_kv()"])
    first, second, third = (way.weights.sensitivity for way in found.ways if way.weights)
    assert first is second  # keys' rounding leaves the weights alone: one sensitivity serves both
    assert sum(third.weights) < sum(first.weights)
    assert found.ways[2].cache == found.ways[0].cache // 2


def test_a_method_rounds_what_was_chosen(base: Base) -> None:
    found = fit(base, weights_of(base, "int4") + 20_000)
    stack = found.quantize(ip.gptq(TEXT, tokens=128, length=32))(base[0])
    assert {n: form.name for n, form in stack.spec.weights} == found.weights.formats
    assert "gptq" in repr(stack.recipe) and stack.spec.cache


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ip.Model]:
    """The stacks that a sensitivity is measured of."""
    found, memory = list[ip.Model](), sys.modules["infopt.budget.memory"]
    own = memory.measured

    def measured(outline: Any, model: ip.Model, *how: Any) -> ip.Sensitivity:
        found.append(model)
        return own(outline, model, *how)

    monkeypatch.setattr(memory, "measured", measured)
    return found


def test_only_what_fits_is_measured_by_matrix(base: Base, seen: list[ip.Model]) -> None:
    beside = ["gqa(kv_heads=1) | cache_kv()", "cache_kv()"]
    least = min(way.least for way in fit(base, 10_000_000, beside).ways)
    assert [model.spec.config.kv_heads for model in seen] == [1, 2]
    found = fit(base, least, beside)
    assert len(seen) == 3 and [way.weights is None for way in found.ways] == [False, True]
    with pytest.raises(InfoptError, match="hold no such model"):
        fit(base, least - 1, beside)
    with pytest.raises(InfoptError, match=r"beside sliding_window.*segments=1: the layers are 2 runs"):
        fit(base, 10_000_000, ["cache_kv()", "sliding_window(16, layers=[0]) | cache_kv()"], segments=1)
    assert len(seen) == 3


def test_a_shared_sensitivity_is_the_first_ways_though_that_does_not_fit(base: Base, seen: list[ip.Model]) -> None:
    memory = fit(base, 10_000_000, CACHES).ways[0].least - 1
    found = fit(base, memory, CACHES)
    assert [way.weights is None for way in found.ways] == [True, False, False]
    assert [model.spec.kv for model in seen] == [None, None]
    s = found.weights.sensitivity
    assert s == ip.sensitivity(*base, formats=[3, 4, 8], text=cut())


def test_other_weights_of_one_shape_have_a_sensitivity_of_their_own(base: Base, seen: list[ip.Model]) -> None:
    found = fit(base, 10_000_000, ["gqa(kv_heads=1) | cache_kv()", "gqa(kv_heads=1, init='first') | cache_kv()"])
    one, other = (way.weights.sensitivity for way in found.ways if way.weights)
    assert len(seen) == 2 and one.spec == other.spec and one.params != other.params and one.kl != other.kl


def test_too_little_memory_and_wrong_ways_are_refused(base: Base) -> None:
    least = min(way.least for way in fit(base, 10_000_000).ways)
    assert fit(base, least).best.bytes == least
    with pytest.raises(InfoptError, match=r"(?s)hold no such model at 64 tokens.*cache_kv\(bits=4\)"):
        fit(base, least - 1)
    with pytest.raises(InfoptError, match="has no cache"):
        fit(base, 10_000_000, ["gqa(kv_heads=1)"])
    with pytest.raises(InfoptError, match="was given a int"):
        fit(base, 10_000_000, [8])
    with pytest.raises(InfoptError, match="nothing was given"):
        fit(base, 10_000_000, [])
    for wrong in (0, -1, math.nan, math.inf, True, "1 GB"):
        with pytest.raises(InfoptError, match="number of bytes"):
            fit(base, wrong)
    with pytest.raises(TransformOrderError, match="packed"):
        fit(base, 10_000_000, ["quantize(bits=8) | cache_kv()"])
    gpt2 = ip.models.gpt2(layers=2, context=64)
    with pytest.raises(PromptError, match="a context of 65 tokens"):
        fit((gpt2, gpt2.init(jax.random.key(0))), 10_000_000, context=65)


def test_a_way_whose_method_read_the_text_is_refused_first(seen: list[ip.Model]) -> None:
    model = ip.models.llama(layers=2, heads=4, kv_heads=2, context=64, tied=False)
    method = ip.gptq(TEXT, tokens=128, length=32)
    way = ip.quantize(bits=8, where="head", method=method) | ip.cache_kv()
    with pytest.raises(EvaluationError, match="calibration and evaluation overlap"):
        fit((model, model.init(jax.random.key(0))), 10_000_000, ["cache_kv()", way])
    assert not seen
