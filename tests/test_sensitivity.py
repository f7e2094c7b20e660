"""Sensitivity and mixed formats: each matrix's own KL, one program for all, budgets and segments kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import infopt as ip
from infopt.budget import alone
from infopt.budget.allocation import allocate
from infopt.budget.rules import rules_of
from infopt.errors import EvaluationError, InfoptError, ParamsError, TransformOrderError
from infopt.model import Weights, segments, shapes

TEXT = [n * n % 61 for n in range(300)]
FAMILIES: dict[str, Callable[[], ip.Model]] = {
    "llama": lambda: ip.models.llama(layers=3, context=64),
    "a mixture of experts": lambda: ip.models.mixtral(layers=2, context=64),
    "a hybrid with a partial period": lambda: ip.models.gemma3(layers=8, context=64),
    "a table of positions": lambda: ip.models.gpt2(layers=2, context=64),
}


def cut() -> ip.Windows:
    return ip.windows(TEXT, 32)


def made(model: ip.Model, seed: int = 0) -> tuple[ip.Model, Any]:
    return model, model.init(jax.random.key(seed))


@pytest.fixture(scope="module")
def base() -> tuple[ip.Model, Any]:
    return made(ip.models.llama(layers=4, context=64))


@pytest.fixture(scope="module")
def found(base: tuple[ip.Model, Any]) -> ip.Sensitivity:
    return ip.sensitivity(*base, formats=[3, 4, 8], text=cut())


# ---------------------------------------------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_that_of_the_stack_with_one_matrix_packed(family: str) -> None:
    model, params = made(FAMILIES[family]())
    found = ip.sensitivity(model, params, 3, text=cut())
    names = list(dict(ip.quantize(bits=3)(model).spec.weights))
    assert sorted(found.names) == sorted(names)
    (name,) = found.worst(1)
    stack = ip.quantize(bits=3, where=name)(model)
    wanted = ip.measure(stack, stack.convert(params), cut(), base=(model, params)).kl.value
    assert wanted > 0
    assert found[name]["int3"] == pytest.approx(wanted, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize(
    "before",
    ["cache_kv(bits=8)", "gqa(kv_heads=1)", "sliding_window(8, sinks=2)", "cache_kv() | paged(page=8)",
     "rotate(online=True)"]
)  # fmt: skip
def test_any_stack_is_a_base(before: str) -> None:
    model, params = made(ip.models.llama(context=64, heads=4, kv_heads=2))
    stack = ip.parse_stack(before)(model)
    own = stack.convert(params)
    name = "layers.1.attn.v"
    found = ip.sensitivity(stack, own, 4, where=name, text=cut())
    packed = ip.quantize(bits=4, where=name)(stack)
    wanted = ip.measure(packed, packed.convert(own, stack), cut(), base=(stack, own)).kl.value
    assert found[name]["int4"] == pytest.approx(wanted, rel=2e-3)


def test_matrices_outside_the_layers_take_part() -> None:
    model, params = made(ip.models.llama(context=64))
    found = ip.sensitivity(model, params, 4, where=["embed", "layers.1.mlp.up"], text=cut())
    assert found.names == ("embed", "layers.1.mlp.up")  # the head is tied to it
    stack = ip.quantize(bits=4, where="embed")(model)
    wanted = ip.measure(stack, stack.convert(params), cut(), base=(model, params)).kl.value
    assert found["embed"]["int4"] == pytest.approx(wanted, rel=2e-3)


def test_a_layer_is_all_its_matrices_at_once(base: tuple[ip.Model, Any]) -> None:
    model, params = base
    found = ip.sensitivity(model, params, format="int4_min", group=64, by="layer", text=cut())
    assert found.names == tuple(f"layers.{i}" for i in range(4))
    stack = ip.quantize(format="int4_min", group=64, where="layers.2.*")(model)
    wanted = ip.measure(stack, stack.convert(params), cut(), base=(model, params)).kl.value
    assert found["layers.2"]["int4_min"] == pytest.approx(wanted, rel=2e-3)


def test_one_program_serves_all_matrices() -> None:
    model, params = made(ip.models.llama(layers=5, context=64, dim=96))
    ip.sensitivity(model, params, 4, where="layers.0.attn.q", text=cut())
    family, spec = alone.family_of(model.spec), model.spec
    programs = [*alone._programs(family, spec), alone._layer_program(family, spec, 0, None)]
    assert [p._cache_size() for p in programs] == [1, 1, 1, 1, 1]  # type: ignore[attr-defined]
    ip.sensitivity(model, params, formats=[3, 4, "nf4"], group=32, text=cut())
    assert [p._cache_size() for p in programs] == [1, 1, 1, 1, 1]  # type: ignore[attr-defined]


def test_blocks_of_text_change_nothing(base: tuple[ip.Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ip.sensitivity(*base, 4, where="*.mlp.down", text=cut())
    vocab = base[0].spec.config.vocab
    monkeypatch.setattr(alone, "BASE", 4 * vocab * 64)  # two windows
    monkeypatch.setattr(alone, "PIECE", 4 * vocab * 10)
    parts = ip.sensitivity(*base, 4, where="*.mlp.down", text=cut())
    assert len(alone._blocks(cut(), vocab)) == 5
    np.testing.assert_allclose(parts.kl, whole.kl, rtol=1e-4)


def test_the_base_is_left_as_it_was(base: tuple[ip.Model, Any]) -> None:
    model, params = base
    before = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    ip.sensitivity(model, params, 4, where="layers.0.*", text=cut())
    for leaf, old in zip(jax.tree.leaves(params), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_bytes_are_those_of_live_buffers(base: tuple[ip.Model, Any], found: ip.Sensitivity) -> None:
    model, params = base
    for i, form in enumerate(found.formats):
        stack = ip.quantize(format=form)(model)
        weights = Weights.of(stack.spec, stack.convert(params))
        for name, sizes in zip(found.names, found.bytes, strict=True):
            assert sizes[i] == sum(leaf.nbytes for leaf in jax.tree.leaves(weights[name]))


def test_default_text_is_the_calibration_split() -> None:
    model, params = ip.load("tiny")
    found = ip.sensitivity(model, params, 4, where="layers.0.attn.q", tokens=200)
    text = ip.windows(ip.texts.topics("calibration"), 512, tokenizer=model.tokenizer).spread(200)
    assert (found.windows, found.tokens) == (text.digest, text.scored)


def test_json_gives_the_same_back(found: ip.Sensitivity) -> None:
    text = found.to_json()
    assert ip.Sensitivity.from_json(text) == found
    assert json.loads(text)["bytes"] == [list(row) for row in found.bytes]
    with pytest.raises(EvaluationError, match="no sensitivity"):
        ip.Sensitivity.from_json("{}")


def test_the_table_shows_the_worst_first_and_the_sum(found: ip.Sensitivity) -> None:
    lines = str(found).splitlines()
    assert lines[2].split()[0] == found.worst(1)[0] == max(found.names, key=lambda n: found[n]["int3"])
    assert lines[-1].startswith(f"the sum of all {len(found.names)}")
    assert f"{math.fsum(row[0] for row in found.kl):.3g}" in lines[-1]
    assert found._repr_markdown_().count("\n| ") == len(lines) - 1 + 1  # a rule below the heads, no title
    assert found.worst(3, "int8") == tuple(sorted(found.names, key=lambda n: -found[n]["int8"])[:3])


@pytest.mark.parametrize("how", [{}, {"by": "layer"}, {"where": ["embed", "layers.[02].attn.q"]}])
def test_the_plot_has_a_panel_a_format(base: tuple[ip.Model, Any], how: dict[str, Any]) -> None:
    found = ip.sensitivity(*base, formats=[4, 8], text=cut(), **how)
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes[:2]] == ["int4", "int8"]
    kinds = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape == (len(kinds), 4)
    for name in found.names:
        kind = "all" if "by" in how else name.split(".", 2)[-1]
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        assert shown[kinds.index(kind), layer] == found[name]["int4"]
    rows = {"embed": 4}  # what lies outside the layers fills its row
    assert np.isfinite(np.ma.filled(shown, np.nan)).sum() == sum(rows.get(name, 1) for name in found.names)
    assert figure.png().startswith(b"\x89PNG")


WRONG: list[tuple[dict[str, Any], type[InfoptError], str]] = [
    ({"format": "int7"}, InfoptError, "not a format"),
    ({"bits": 7}, InfoptError, "not a format"),
    ({"format": "q4_k"}, InfoptError, "nothing here rounds to"),
    ({"formats": []}, InfoptError, "are none"),
    ({"formats": [4, "int4"]}, InfoptError, "not all different"),
    ({"bits": 4, "formats": ["int8"]}, InfoptError, "each says the formats"),
    ({"where": "layers.9.*"}, InfoptError, "no weight is named like"),
    ({"group": 7}, InfoptError, "does not"),
    ({"by": "head"}, InfoptError, "by='head'"),
    ({"text": [1, 2, 3]}, EvaluationError, "too short"),
    ({"text": None}, EvaluationError, "no tokenizer"),
    ({"text": [999] * 100}, EvaluationError, "outside the vocabulary"),
]


@pytest.mark.parametrize(("how", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_cannot_be_measured_is_refused(
    base: tuple[ip.Model, Any], how: dict[str, Any], error: type[InfoptError], message: str
) -> None:
    with pytest.raises(error, match=message):
        ip.sensitivity(*base, **{"text": TEXT} | how)


def test_other_bases_are_refused(base: tuple[ip.Model, Any]) -> None:
    model, params = base
    packed = ip.quantize(bits=8, where="*.attn.*")(model)
    own = packed.convert(params)
    with pytest.raises(TransformOrderError, match=r"dequantize\(\)"):
        ip.sensitivity(packed, own, 4, text=cut())
    assert ip.sensitivity(packed, own, 4, where="layers.0.mlp.*", text=cut()).sums()["int4"] > 0
    with pytest.raises(ParamsError):
        ip.sensitivity(packed, params, 4, where="layers.0.mlp.*", text=cut())
    pair = (ip.cache_kv() | ip.speculative(draft=ip.self_draft(ip.quantize(bits=4)), k=2))(model)
    with pytest.raises(InfoptError, match="before speculative"):
        ip.sensitivity(pair, pair.convert(params), 4, text=cut())


def test_a_weight_that_is_not_finite_is_named(base: tuple[ip.Model, Any]) -> None:
    model, params = base
    blocks = [dict(block) for block in params["segments"][0]]
    blocks[0]["mlp.up"] = blocks[0]["mlp.up"].at[2, 0, 0].set(np.nan)
    with pytest.raises(EvaluationError, match="not finite"):
        ip.sensitivity(model, params | {"segments": (tuple(blocks),)}, 4, where="layers.2.mlp.up", text=cut())


# ---------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_say_the_choice_and_nothing_else(family: str) -> None:
    model = FAMILIES[family]()
    names = list(dict(ip.quantize(bits=8)(model).spec.weights))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rare, own = rng.choice([0.0, 0.1, 0.9]), names if seed % 2 else [n for n in names if rng.random() < 0.8]
        chosen = {n: str(rng.choice(["int8", "int3"])) if rng.random() < rare else "int4" for n in own}
        got = ip.quantize(where=rules_of(model.spec, chosen)).formats(model.spec)
        assert {n: form.name for n, form in got.items()} == chosen


def test_rules_are_short() -> None:
    model = ip.models.llama(layers=30)
    chosen = dict.fromkeys(dict(ip.quantize(bits=8)(model).spec.weights), "int4")
    assert rules_of(model.spec, chosen) == {"layers.*": "int4"}
    chosen |= {f"layers.{i}.mlp.down": "int8" for i in (3, 4, 5, 9, 20)} | {
        f"layers.{i}.attn.v": "int8" for i in range(30)
    }
    assert rules_of(model.spec, chosen) == {
        "layers.[3-59].mlp.down": "int8",
        "layers.20.mlp.down": "int8",
        "layers.*.attn.v": "int8",
        "layers.*": "int4",
    }


# ----------------------------------------------------------------------------------------------------------- allocation


def runs(choice: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return 1 + ((choice[..., 1:, :] != choice[..., :-1, :]).any(-1) | (groups[1:] != groups[:-1])).sum(-1)


def test_allocation_is_near_the_best_there_is() -> None:
    """Of all 3 ** 8 choices, tried one by one."""
    every = np.array(list(itertools.product(range(3), repeat=8))).reshape(-1, 4, 2)
    ratios = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        kl = np.exp(rng.normal(size=(4, 2, 1))) * np.array([16.0, 4.0, 0.1])
        bits = np.ones((4, 1, 1)) * rng.integers(1, 9, (1, 2, 1)) * np.array([3.0, 4.0, 8.0])
        groups, most = np.array([0, 0, 0, 0] if seed % 2 else [0, 0, 1, 1]), 2 + seed % 3
        least, greatest = bits.min(-1).sum(), bits.max(-1).sum()
        budget = least + (greatest - least) * rng.random()
        costs, sizes = (np.take_along_axis(x[None], every[..., None], 3).sum((1, 2, 3)) for x in (kl, bits))
        fits = (sizes <= budget) & (runs(every, groups) <= most)
        choice = allocate(kl, bits, groups, budget, most)
        assert np.take_along_axis(bits, choice[..., None], 2).sum() <= budget
        assert runs(choice, groups) <= most
        ratios.append(np.take_along_axis(kl, choice[..., None], 2).sum() / costs[fits].min())
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 1.01
    assert max(ratios) < 1.2


# ---------------------------------------------------------------------------------------------------------------- mixed


@pytest.mark.parametrize("count", ["stored", "codes"])
@pytest.mark.parametrize("budget", [3.6, 4.25, 5, 7.77])
def test_the_budget_and_the_segments_are_kept(
    base: tuple[ip.Model, Any], found: ip.Sensitivity, budget: float, count: str
) -> None:
    model, params = base
    got = ip.mixed(model, params, budget, sensitivity=found, segments=3, count=count, text=cut())
    stack = got.transform(model)
    assert len(segments(stack.spec)) == got.segments <= 3
    weights = Weights.of(stack.spec, stack.convert(params))
    live = sum(leaf.nbytes for n in got.formats for leaf in jax.tree.leaves(weights[n]))
    values = sum(math.prod(shapes(model.spec)[n]) for n in got.formats)
    codes = sum({"int3": 3, "int4": 4, "int8": 8}[f] * math.prod(shapes(model.spec)[n]) for n, f in got.formats.items())
    assert live == got.bytes
    assert got.bits == (8 * live if count == "stored" else codes) / values <= budget
    assert got.bits > budget - 0.5
    assert {n: form.name for n, form in stack.spec.weights} == got.formats
    assert got == ip.mixed(model, params, budget, sensitivity=found, segments=3, count=count, text=cut())


def test_prediction_is_the_sum_and_the_truth_is_measured(base: tuple[ip.Model, Any], found: ip.Sensitivity) -> None:
    model, params = base
    got = ip.mixed(model, params, 4.25, sensitivity=found, text=cut())
    alone_ = [found[n][form] for n, form in zip(found.names, got.choice, strict=True)]
    assert got.predicted == math.fsum(alone_)
    stack = got.transform(model)
    wanted = ip.measure(stack, stack.convert(params), cut(), base=(model, params)).kl.value
    assert got.actual == pytest.approx(wanted, rel=2e-3)
    assert got.error == pytest.approx(wanted / got.predicted - 1, abs=5e-3)
    assert got.measure(model, params, cut()).kl.value == pytest.approx(wanted, rel=2e-3)
    assert f"measured {got.actual:.3g}" in str(got)


def test_more_segments_and_more_bits_predict_less(base: tuple[ip.Model, Any], found: ip.Sensitivity) -> None:
    by_segments = [ip.mixed(*base, 4.25, sensitivity=found, segments=n, text=cut()).predicted for n in (1, 2, 4)]
    assert by_segments[0] >= by_segments[1] >= by_segments[2]
    by_bits = [ip.mixed(*base, b, sensitivity=found, text=cut()).predicted for b in (3.6, 4.6, 6, 8.6)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] == found.sums()["int8"]  # all in the widest


def test_a_trained_model_gains_by_it() -> None:
    model, params = ip.load("tiny")
    text = ip.windows(ip.texts.topics("calibration"), 128, tokenizer=model.tokenizer).spread(256)
    got = ip.mixed(model, params, 5, formats=[4, 8], text=text, progress=False)
    assert got.actual is not None
    assert abs(got.error) < 0.5
    others = [got.random(seed) for seed in range(3)]
    assert all(other.bytes <= got.bytes and other.bytes > 0.98 * got.bytes for other in others)
    assert len({other.choice for other in others}) == 3
    assert got.random(1) == others[1]
    kls = [other.measure(model, params, text).kl.value for other in others]
    assert got.actual < 0.9 * min(kls)
    held = ip.windows(ip.texts.topics("heldout"), 512, tokenizer=model.tokenizer).spread(512)
    by_default, on_held = got.measure(model, params, tokens=512).kl.value, got.measure(model, params, held).kl.value
    assert by_default == on_held != got.actual


def test_layers_and_what_lies_outside_can_be_chosen_for(base: tuple[ip.Model, Any]) -> None:
    model, params = base
    layers = ip.sensitivity(model, params, formats=[4, 8], by="layer", text=cut())
    got = ip.mixed(model, params, 6, sensitivity=layers, segments=2, text=cut())
    assert got.segments == 2
    assert all(len({got.formats[f"layers.{i}.{k}"] for k in ("attn.q", "mlp.up")}) == 1 for i in range(4))
    whole = ip.sensitivity(model, params, formats=[4, 8], where=["embed", "layers.*.mlp.*"], text=cut())
    got = ip.mixed(model, params, 6, sensitivity=whole, segments=1, text=cut())
    assert got.segments == 1
    assert set(got.formats) == {"embed", *(n for n in whole.names if ".mlp." in n)}


def test_a_hybrid_counts_the_runs_that_it_has() -> None:
    model, params = made(ip.models.gemma3(layers=8, context=64))
    base = len(segments(model.spec))
    found = ip.sensitivity(model, params, formats=[4, 8], where="layers.*.mlp.*", text=cut())
    got = ip.mixed(model, params, 6, sensitivity=found, segments=base, text=cut())
    assert got.segments == base > 1
    with pytest.raises(InfoptError, match=f"segments >= {base}"):
        ip.mixed(model, params, 6, sensitivity=found, segments=base - 1, text=cut())


def test_a_method_rounds_what_was_chosen(base: tuple[ip.Model, Any], found: ip.Sensitivity) -> None:
    model, params = base
    got = ip.mixed(model, params, 4.25, sensitivity=found, text=cut())
    stack = got.quantize(method=ip.gptq(TEXT, tokens=128, length=32))(model)
    assert {n: form.name for n, form in stack.spec.weights} == got.formats
    assert "gptq" in repr(stack.recipe)
    with pytest.raises(EvaluationError, match=r"overlap: .* of the evaluation stand in what .*gptq"):
        got.measure(model, params, cut(), method=ip.gptq(TEXT, tokens=128, length=32))
    other = np.random.default_rng(0).integers(0, 61, 128)
    scores = got.measure(model, params, cut(), method=ip.gptq(other, length=32))
    assert scores.kl.value != got.measure(model, params, cut()).kl.value


def test_what_cannot_be_met_is_refused_before_anything_is_measured(
    base: tuple[ip.Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("minutes of a large model")

    monkeypatch.setattr(sys.modules["infopt.budget.mixed"], "measured", measured)
    with pytest.raises(InfoptError, match="cannot be met"):
        ip.mixed(*base, 3, text=cut())
    with pytest.raises(InfoptError, match="2 runs already"):
        model = ip.sliding_window(16, layers=[0])(base[0])
        ip.mixed(model, model.convert(base[1]), 6, segments=1, text=cut())
    with pytest.raises(AssertionError):
        ip.mixed(*base, 6, text=cut())


def test_wrong_budgets_are_refused(base: tuple[ip.Model, Any], found: ip.Sensitivity) -> None:
    def mixed(budget: Any = 4.25, **how: Any) -> ip.Mixed:
        return ip.mixed(*base, budget, **{"sensitivity": found, "text": cut()} | how)

    least = sum(row[0] for row in found.bytes) * 8 / sum(found.weights)
    with pytest.raises(InfoptError, match=f"takes {math.ceil(least * 1e4) / 1e4:g}, its scales included"):
        mixed(3.25)
    with pytest.raises(InfoptError, match=r"takes 3\."):
        mixed(2.9, count="codes")
    assert mixed(math.ceil(least * 1e4) / 1e4).predicted == found.sums()["int3"]
    for wrong in (0, -1, math.nan, math.inf, "4", True):
        with pytest.raises(InfoptError, match="bits a weight"):
            mixed(wrong)
    with pytest.raises(InfoptError, match="counted one way"):
        mixed(count="scales")
    with pytest.raises(InfoptError, match="segments=0"):
        mixed(segments=0)
    with pytest.raises(InfoptError, match="a sensitivity"):
        mixed(formats=[4, 8])
    with pytest.raises(EvaluationError, match="another text"):
        mixed(text=TEXT[:200])
    other = dataclasses.replace(found, spec=ip.models.llama(layers=5, context=64).spec)
    with pytest.raises(EvaluationError, match="another model"):
        mixed(sensitivity=other)
    with pytest.raises(EvaluationError, match="another model"):
        mixed(sensitivity=ip.sensitivity(base[0], base[0].init(jax.random.key(1)), 4, where="*.q", text=cut()))
