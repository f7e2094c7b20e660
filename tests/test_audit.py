"""The audit: each matrix's rule, format, bytes and error; what fails it; the same lines after save and load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import cli
from infopt.audit import Audit, inspect, ranges
from infopt.errors import AuditError, ParamsError
from infopt.model import Weights, assemble
from infopt.qtensor import dequantize_array
from infopt.transforms.base import Transform

BASE = ip.models.llama(layers=2, dim=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=11, context=32, tied=False)
PARAMS = BASE.init(jax.random.key(0))
TIED = dataclasses.replace(BASE, spec=ip.models.llama(layers=1, dim=16, heads=2, head_dim=8, mlp=16, vocab=11).spec)
NF4 = ip.quantize(format="nf4", group=8, where="*.mlp.*")
MIXED = ip.quantize(where={"head": 8, "*.mlp.*": 4, "*": None}, group=8)


def stack(transform: Transform) -> tuple[ip.Model, Any]:
    model = transform(BASE)
    return model, model.convert(PARAMS)


def by_name(found: Audit) -> dict[str, Any]:
    return {line.name: line for line in found.lines}


def damaged(params: Any, name: str, change: Any) -> Any:
    """`params` with a stack of its first segment, or a weight outside the layers, changed."""
    if name in params:
        return params | {name: change(params[name])}
    (blocks,), *others = params["segments"]
    return params | {"segments": ((blocks | {name: change(blocks[name])},), *others)}


# ------------------------------------------------------------------------------------------------------------ the table


def test_a_matrix_of_a_rule_has_its_pattern_format_bits_bytes_and_error() -> None:
    model, params = stack(NF4)
    found = by_name(model.audit(params))
    up, q = found["layers.1.mlp.up"], found["layers.1.attn.q"]
    assert (up.rule, up.format, up.group, up.changed) == ("1: *.mlp.*", "nf4", "8", "yes")
    assert up.bytes == 16 * 8 + 16 * 2 * 2 + 4 == up.bits * 256 / 8
    w, packed = (p["segments"][0][0]["mlp.up"] for p in (PARAMS, params))
    want = np.asarray(w[1], np.float64)
    got = np.asarray(dequantize_array(packed[1]), np.float64)
    assert up.error == pytest.approx(np.linalg.norm(want - got) / np.linalg.norm(want), rel=1e-5)
    assert (q.rule, q.format, q.group, q.bits, q.error, q.changed) == ("-", "float32", "-", 32, None, "no")


def test_each_rule_of_a_mapping_is_told_and_what_stays_dense_too() -> None:
    model, params = stack(MIXED)
    found = by_name(model.audit(params))
    assert {n: (line.rule, line.format) for n, line in found.items() if "layers.1." not in n} == {
        "embed": ("1: *", "float32"),
        **{f"layers.0.attn.{n}": ("1: *", "float32") for n in "koqv"},
        **{f"layers.0.mlp.{n}": ("1: *.mlp.*", "int4") for n in ("down", "gate", "up")},
        "head": ("1: head", "int8"),
    }
    assert [*found][:: len(found) - 1] == ["embed", "head"]


def test_totals_are_the_live_buffers_bytes_and_those_of_the_repr() -> None:
    model, params = stack(MIXED)
    found = model.audit(params)
    live = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found.bytes == live == model.weight_bytes()
    assert found.totals[0][:2] == ("packed matrices", 7)
    assert str(found).splitlines()[-1].split()[:4] == ["whole", "model", f"{live:,}", "bytes"]
    assert sum(line.bytes for line in found.lines) == live - found.totals[2][2]


def test_weights_that_lie_on_the_grid_are_told_to_be_unchanged() -> None:
    model = (ip.quantize(bits=8) | ip.dequantize() | ip.quantize(bits=8))(BASE)
    (once, first), twice = stack(ip.quantize(bits=8)), model.convert(PARAMS)
    again = {line.error or 0.0 for line in inspect(model, twice).lines if "mlp" in line.name}
    assert max(again) < 1e-6 < min(line.error or 0 for line in once.audit(first).lines if "mlp" in line.name)
    halves = jax.tree.map(lambda x: jnp.round(x), PARAMS)
    grid = ip.quantize(format="fp16")(BASE)
    assert by_name(grid.audit(grid.convert(halves)))["layers.0.mlp.up"].changed == "no"
    assert by_name(grid.audit(grid.convert(halves)))["layers.0.mlp.up"].error == 0


def test_what_other_transforms_change_is_not_told_to_be_unchanged() -> None:
    model, params = stack(ip.gqa(1) | ip.quantize(bits=8, where="*.attn.k") | ip.cache_kv())
    found = model.audit(params)
    assert found.rules == ("gqa(kv_heads=1)", "quantize(bits=8, where='*.attn.k')")
    told = {n: (line.rule, line.changed) for n, line in by_name(found).items() if n.startswith("layers.0.attn")}
    no = ("-", "no")
    assert told == {
        **{f"layers.0.attn.{n}": no for n in "oq"},
        "layers.0.attn.k": ("2: *.attn.k", "yes"),
        "layers.0.attn.v": ("1: gqa", "yes"),
    }
    model, params = stack(ip.quantize(bits=8) | ip.dequantize())
    line = by_name(model.audit(params))["layers.0.mlp.up"]
    assert (line.rule, line.format, line.error, line.changed) == ("2: dequantize", "float32", None, "yes")


def test_a_tied_head_is_told_and_counted_once() -> None:
    model = ip.quantize(bits=8, where="embed")(TIED)
    found = model.audit(model.init(jax.random.key(1)))
    head = found.lines[-1]
    assert (head.name, head.rule, head.format, head.bytes) == ("head", "1: embed", "= embed", 0)
    assert found.bytes == model.weight_bytes()
    assert found.totals[0][:2] == ("packed matrices", 1)


def test_a_draft_is_audited_behind_its_prefix() -> None:
    transform = NF4 | ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=4, group=8, where="*.up")), k=2)
    model, params = stack(transform)
    found = by_name(model.audit(params))
    assert found["layers.0.mlp.up"].rule == "1: *.mlp.*"
    assert (found["draft.layers.0.mlp.up"].rule, found["draft.layers.0.mlp.up"].format) == ("2: *.up", "int4")
    down = found["draft.layers.0.mlp.down"]
    assert (down.rule, down.format, down.changed) == ("1: *.mlp.*, taken dense", "float32", "yes")
    assert model.audit(params).bytes == model.weight_bytes()


def test_a_draft_model_and_the_target_itself_are_audited() -> None:
    draft = (ip.quantize(bits=8) | ip.cache_kv())(BASE)
    model = (ip.cache_kv() | ip.speculative(draft, k=2))(BASE)
    found = model.audit(model.convert(PARAMS, draft=draft.convert(PARAMS)))
    line = by_name(found)["draft.layers.0.mlp.up"]
    assert (line.rule, line.format, found.rules) == (
        "1: the layers' matrices",
        "int8",
        ("quantize(bits=8), of the draft",),
    )
    model, params = stack(NF4 | ip.cache_kv() | ip.speculative(ip.self_draft(), k=2))
    assert by_name(model.audit(params))["draft.layers.0.mlp.up"].rule == "1: *.mlp.*"


def test_weights_that_were_packed_when_loaded_are_as_loaded() -> None:
    kept = ip.Model.of(ip.model.FAMILIES["llama"], BASE.spec.config, weights=ip.quantize(bits=8)(BASE).spec.weights)
    params = ip.quantize(bits=8)(BASE).convert(PARAMS)
    up = dataclasses.replace(
        params["segments"][0][0]["mlp.up"], error=jnp.full((2, 1, 1), jnp.nan)
    )  # as a file's blocks have it
    params = damaged(params, "mlp.up", lambda _: up)
    line = by_name(kept.audit(params))["layers.1.mlp.up"]
    assert (line.rule, line.format, line.error, line.changed) == ("as loaded", "int8", None, "as loaded")
    assert "nan" not in str(kept.audit(params))


@dataclasses.dataclass(frozen=True, repr=False)
class Halved(Transform):
    """A third party's: its text cannot be parsed."""

    name: ClassVar[str] = "halved"

    @property
    def exact(self) -> bool:
        return False

    def check(self, spec: ip.Spec) -> None:
        pass

    def edit(self, spec: ip.Spec) -> ip.Spec:
        return spec


def test_a_transform_that_is_not_known_makes_its_rules_unknown() -> None:
    model, params = stack(NF4 | Halved())
    found = by_name(model.audit(params))
    assert (found["layers.0.mlp.up"].rule, found["layers.0.attn.q"].rule) == ("1: *.mlp.*", "?")
    assert found["layers.0.attn.q"].changed == "?"


# ------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "transform",
    [MIXED | ip.cache_kv(), NF4 | ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=8)), k=2)],
    ids=["mapping", "draft"],
)
def test_the_lines_are_the_same_after_save_and_load(transform: Transform, tmp_path: Path) -> None:
    model, params = stack(transform)
    ip.save(tmp_path / "stack", model, params)
    loaded, loaded_params = ip.load(tmp_path / "stack")
    assert str(loaded.audit(loaded_params)) == str(model.audit(params))
    assert loaded.audit(loaded_params).to_json() == model.audit(params).to_json()


def test_a_stack_from_before_errors_were_kept_says_so() -> None:
    model, params = ip.load(Path(__file__).parent / "fixtures" / "saved_stack_v1" / "stack")
    with pytest.raises(AuditError, match="saved before errors of rounding") as caught:
        model.audit(params)
    assert "draft.layers.0-1.mlp.up" in caught.value.what


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_every_matrix_that_a_rule_did_not_reach_is_named() -> None:
    model, params = stack(NF4)
    params = damaged(params, "mlp.up", dequantize_array)
    params = damaged(params, "mlp.down", lambda _: stack(ip.quantize(bits=8))[1]["segments"][0][0]["mlp.down"])
    with pytest.raises(AuditError) as caught:
        model.audit(params)
    assert caught.value.what.startswith("4 matrices are not what the stack says: ")
    for name in ("layers.0-1.mlp.up: is dense", "layers.0-1.mlp.down: is Format(name='int8'"):
        assert name in caught.value.why
    table = caught.value.audit
    assert isinstance(table, Audit)
    assert [line.name for line in table.problems] == [f"layers.{i}.mlp.{n}" for i in (0, 1) for n in ("down", "up")]
    marked = [text for text in str(table).splitlines() if "  <- " in text]
    assert len(marked) == 4


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("mlp.up", lambda x: dataclasses.replace(x, error=x.error.at[1].set(jnp.nan)), "rounding is not known"),
        ("mlp.up", lambda x: dataclasses.replace(x, error=None), "rounding is not known"),
        ("mlp.up", lambda x: dataclasses.replace(x, error=x.error.at[1].set(jnp.inf)), "is no size"),
        ("mlp.up", lambda x: dataclasses.replace(x, scale=x.scale.at[1, 3].set(jnp.inf)), "its scale holds NaN or inf"),
        ("mlp.up", lambda x: dataclasses.replace(x, scale=x.scale[..., :1]), "has scale (2, 16, 1)"),
        ("mlp.up", lambda x: x[:, :8], "has codes (2, 8, 8), and nf4 needs (2, 16, 8)"),
        ("attn.q", lambda x: x.at[1, 0, 0].set(jnp.nan), "its array holds NaN or inf"),
        ("attn.q", lambda x: x[..., :8], "has shape (2, 16, 8)"),
        ("embed", lambda x: x.at[0, 0].set(jnp.inf), "its array holds NaN or inf"),
    ],
    ids=["NaN", "none", "infinite", "scale", "scales", "rows", "dense NaN", "dense shape", "embedding"],
)
def test_what_is_damaged_fails_with_its_name(name: str, change: Any, why: str) -> None:
    model, params = stack(NF4)
    with pytest.raises(AuditError) as caught:
        model.audit(damaged(params, name, change))
    assert why in caught.value.why
    assert (name if name == "embed" else f"1.{name}") in caught.value.what
    assert caught.value.fix


def test_a_spec_that_does_not_say_what_the_rules_say_fails() -> None:
    model, params = stack(ip.quantize(bits=8, where="*.mlp.*"))
    other = dataclasses.replace(model, recipe=ip.quantize(bits=8)(BASE).recipe)
    with pytest.raises(AuditError, match=r"layers\.0-1\.attn\.q") as caught:
        other.audit(params)
    assert "int8 by its rule, and the Spec says dense" in caught.value.why


@pytest.mark.parametrize("params", [None, {}, {"segments": ()}, {"target": PARAMS, "draft": PARAMS}, PARAMS["embed"]])
def test_params_of_no_such_model_are_refused(params: Any) -> None:
    with pytest.raises(ParamsError):
        BASE.audit(params)


def test_a_pair_is_asked_of_a_speculative_stack_and_values_of_all() -> None:
    model, _ = stack(ip.cache_kv() | ip.speculative(ip.self_draft(), k=1))
    with pytest.raises(ParamsError, match="a pair"):
        model.audit(PARAMS)
    with pytest.raises(ParamsError, match="inside a transformation"):
        jax.jit(lambda p: BASE.audit(p) and 0)(PARAMS)


# ------------------------------------------------------------------------------------------------------------- printing


def test_the_table_is_aligned_and_its_other_forms_hold_the_same() -> None:
    model, params = stack(MIXED)
    found = model.audit(params)
    assert repr(found) == str(found)
    head, rule, empty, headings, *rows = str(found).splitlines()
    assert head == repr(model).splitlines()[0]
    assert rule == f"  1  {MIXED!r}" and empty == ""
    assert headings.split() == ["matrix", "rule", "format", "group", "bits", "bytes", "error", "changed"]
    assert {row.index(row.split()[-1]) for row in rows[: len(found.lines)]} == {headings.index("changed")}
    assert json.loads(found.to_json())["lines"][0] == dataclasses.asdict(found.lines[0])
    assert found._repr_markdown_().count("\n| ") == len(found.lines) + 1


def test_ranges_join_neighbouring_layers() -> None:
    assert ranges(["draft.layers.3.a", "draft.layers.4.a", "layers.4.a"]) == ["draft.layers.3-4.a", "layers.4.a"]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFOPT_COMPILE_CACHE", "0")
    ip.save(tmp_path / "base", BASE, PARAMS)
    return tmp_path / "base"


def test_the_command_prints_the_table(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "quantize(format='nf4', where='*.mlp.*', group=8)"
    assert cli.main(["audit", str(saved), "--stack", text]) == 0
    out, err = capsys.readouterr()
    model, params = stack(NF4)
    assert (out, err) == (f"{model.audit(params)}\n", "")
    assert cli.main(["audit", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"][0]["name"] == "embed"


def test_the_command_prints_the_table_marks_what_is_wrong_and_fails(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = ip.Model.convert
    monkeypatch.setattr(ip.Model, "convert", lambda m, p: damaged(convert(m, p), "mlp.up", dequantize_array))
    assert cli.main(["audit", str(saved), "--stack", repr(NF4)]) == 2
    out, err = capsys.readouterr()
    assert out.count("  <- is dense") == 2
    assert err.count("\n") == 1 and "layers.0-1.mlp.up" in err and "fix: " in err


def test_a_rule_of_no_name_costs_the_command_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(saved), "--stack", "quantize(bits=8, where='mlp.*')"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean '*.mlp.*'?" in err


def test_an_expert_that_nothing_went_into_is_named() -> None:
    """All shares go to two experts of four: the others' matrices were rounded without a look."""
    model, params = ip.testing.base_of("mixtral")
    blocks = params["segments"][0][0]
    router = blocks["mlp.router"].at[1, 2:].set(0)  # equal scores, of which the first are taken
    away = {**blocks, "mlp.router": router.at[1, :2].multiply(0)}
    lone = {**params, "segments": (({**away},),)}
    text = np.random.default_rng(0).integers(0, model.spec.config.vocab, 256)
    for method in (ip.gptq(text, length=32), ip.autoround(text, length=32, start=ip.gptq(text, length=32), steps=1)):
        stack = ip.quantize(bits=4, group=16, method=method)(model)
        own = stack.convert(lone)
        said = {line.name: line.changed for line in stack.audit(own).lines if "unread" in line.changed}
        assert {n.split(".", 2)[2] for n in said} == {f"mlp.experts.{n}" for n in ("gate", "up", "down")}
        assert all(n.startswith("layers.1.") and s == "yes, 2 of 4 experts unread" for n, s in said.items())
    plain = ip.quantize(bits=4, group=16)(model)
    assert "unread" not in str(plain.audit(plain.convert(lone)))


def test_matrices_with_inputs_that_were_always_0_are_named() -> None:
    """A channel of values that is 0: the columns of attn.o that read it were rounded without a look."""
    model, params = ip.testing.base_of("llama")
    weights = Weights.of(model.spec, params)
    dead = assemble(model.spec, weights.made(["layers.1.attn.v"], lambda n: weights[n].at[3].set(0)))
    text = np.random.default_rng(0).integers(0, model.spec.config.vocab, 256)
    for method in (ip.gptq(text, length=32), ip.distilled(text, length=32, steps=1, rates=1e-3)):
        stack = ip.quantize(bits=4, group=16, method=method)(model)
        for own, want in ((dead, {"layers.1.attn.o"}), (params, set())):
            audit = stack.audit(stack.convert(own))
            assert {line.name for line in audit.lines if line.changed == "yes, some inputs always 0"} == want
            assert all(line.error is None or line.error > 0 for line in audit.lines)
