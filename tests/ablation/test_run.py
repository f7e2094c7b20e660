"""What a row is: the stack's own path, the base's windows, written when it is done and never measured twice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import evaluate
from infopt.ablation import MORE, STANDARD, run
from infopt.errors import CheckpointError, EvaluationError, InfoptError, TransformOrderError
from infopt.io import disk

MODEL = ip.models.llama(layers=2, dim=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=61, context=64)
PARAMS = MODEL.init(jax.random.key(0))
TEXT = (np.random.default_rng(0).integers(0, 61, 1500)).tolist()
QUALITY = ["ppl", "kl", "kl99", "top1"]
STACKS = {"int8": "quantize(bits=8)", "int4": ip.quantize(bits=4, group=16), "kv": "cache_kv(bits=8)"}


def ablate(stacks: Any = STACKS, **options: Any) -> ip.Table:
    return ip.ablate(MODEL, PARAMS, stacks, **{"text": TEXT, "metrics": QUALITY, "length": 32, "tokens": 600} | options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the rows that are measured."""
    names, real = [], run._measure

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return real(name, *args)

    monkeypatch.setattr(run, "_measure", counted)
    yield names


def test_the_base_comes_first_and_agrees_with_itself_exactly() -> None:
    table = ablate()
    assert [row.name for row in table.rows] == ["fp32", "int8", "int4", "kv"]
    base = table.rows[0]
    assert (base.scores.kl.value, base.scores.kl99.value, base.scores.top1.value) == (0.0, 0.0, 1.0)
    assert base.exact and not table["int8"].exact


def test_a_row_is_what_measure_says_of_the_stack_on_its_own_path() -> None:
    row = ablate()["int4"]
    stack = (ip.quantize(bits=4, group=16) | ip.cache_kv())(MODEL)
    cut = ip.windows(TEXT, 32).spread(600)
    base = ip.cache_kv()(MODEL)
    params = stack.convert(PARAMS)
    assert row.scores == ip.measure(stack, params, cut, (base, base.convert(PARAMS)))
    assert row.stack == "quantize(bits=4, group=16) | cache_kv()"
    assert row.error == max(each.error for each in stack.audit(params).lines if each.error is not None)
    assert row.spec == json.loads(stack.spec.to_json())
    assert row.weight_bytes == sum(x.nbytes for x in jax.tree.leaves(params)) == stack.weight_bytes()
    state = stack.init_state(1, 32)
    assert row.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state.kv)) == 32 * row.token_bytes


def test_a_model_is_taken_as_it_is_and_a_stack_gets_a_cache() -> None:
    table = ablate({"no cache": MODEL, "window": "sliding_window(8)"})
    assert table["no cache"].token_bytes == 0
    assert table["no cache"].scores.kl.value < 1e-9
    assert table["window"].stack == "sliding_window(size=8) | cache_kv()"


def test_equal_stacks_are_measured_once(measured: list[str]) -> None:
    table = ablate({"a": "quantize(bits=8)", "b": ip.quantize(bits=8), "c": ip.quantize(bits=8) | ip.cache_kv()})
    assert measured == ["fp32", "a"]
    assert [row.name for row in table.rows] == ["fp32", "a", "b", "c"]
    assert table["a"].scores == table["b"].scores == table["c"].scores


def test_equal_specs_of_different_recipes_are_measured_apart(measured: list[str]) -> None:
    ablate({"plain": "cache_kv()", "there and back": "quantize(bits=4, group=16) | dequantize() | cache_kv()"})
    assert measured == ["fp32", "there and back"]


def test_the_base_is_read_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], evaluate._runner

    def counted(model: Any, params: Any) -> Any:
        runner = real(model, params)

        def read(tokens: np.ndarray) -> Any:
            made.append(model.spec)
            return runner.read(tokens)

        return runner._replace(read=read)

    monkeypatch.setattr(evaluate, "_runner", counted)
    ablate({"int8": "quantize(bits=8)", "int4": "quantize(bits=4, group=16)"})
    base = ip.cache_kv()(MODEL).spec
    batches = len(made) // 4  # three rows, and the base once more: what its own row is held against
    assert made.count(base) == 2 * batches


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_file(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ablate(out=tmp_path / "whole")
    real, done = run._measure, []

    def killed(*args: Any) -> Any:
        if len(done) == killed_at:
            raise KeyboardInterrupt
        done.append(args[0])
        return real(*args)

    monkeypatch.setattr(run, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        ablate(out=tmp_path / "part")
    assert len((tmp_path / "part" / "rows.jsonl").read_text().splitlines()) == killed_at
    again: list[str] = []

    def counted(*args: Any) -> Any:
        again.append(args[0])
        return real(*args)

    monkeypatch.setattr(run, "_measure", counted)
    table = ablate(out=tmp_path / "part")
    assert done + again == ["fp32", *STACKS]
    assert str(table) == str(whole)
    assert (tmp_path / "part" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["rows.jsonl"]


SCRIPT = """
import sys, jax, infopt as ip
model = ip.models.llama(layers=2, dim=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=61, context=64)
stacks = {"int8": "quantize(bits=8)", "int4": "quantize(bits=4, group=16)", "kv": "cache_kv(bits=8)"}
text = [n * n % 61 for n in range(1500)]
ip.ablate(model, model.init(jax.random.key(0)), stacks, text=text, metrics=["ppl", "kl"], length=32, out=sys.argv[1])
"""


def test_a_process_that_is_killed_at_work_leaves_whole_rows_and_no_lock(tmp_path: Path) -> None:
    """By SIGKILL, which nothing can catch, as soon as there is a row."""
    whole, part = tmp_path / "whole" / "rows.jsonl", tmp_path / "part" / "rows.jsonl"
    command = [sys.executable, "-c", SCRIPT]
    subprocess.run([*command, str(whole.parent)], check=True)
    with subprocess.Popen([*command, str(part.parent)]) as process:
        while process.poll() is None and not (part.exists() and part.read_bytes()):
            time.sleep(0.005)
        process.kill()
    lines = part.read_bytes().splitlines(keepends=True)
    assert 1 <= len(lines) < 4, "it was killed too late to show anything"
    assert whole.read_bytes().startswith(b"".join(lines))
    (part.parent / ".rows.jsonl.4711").write_text("half a r")  # as of one that was killed while it wrote
    subprocess.run([*command, str(part.parent)], check=True)
    assert part.read_bytes() == whole.read_bytes()
    assert [path.name for path in part.parent.iterdir()] == ["rows.jsonl"]


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, measured: list[str]) -> None:
    with disk.held(tmp_path) as alone:
        assert alone
        with pytest.raises(EvaluationError, match="another process is measuring into") as caught:
            ablate({}, out=tmp_path)
    assert caught.value.fix == "wait for it, or another folder"
    assert measured == []
    ablate({}, out=tmp_path)
    assert measured == ["fp32"]


def test_another_text_or_more_metrics_are_measured_anew_and_kept_beside(tmp_path: Path, measured: list[str]) -> None:
    stacks = {"int8": "quantize(bits=8)"}
    ablate(stacks, out=tmp_path)
    ablate(stacks, out=tmp_path, seed=3)  # intervals alone
    assert len(measured) == 2
    ablate(stacks, out=tmp_path, text=TEXT[::-1])
    assert len(measured) == 4
    ablate(stacks, out=tmp_path, metrics=["greedy"])
    assert len(measured) == 6
    ablate(stacks, out=tmp_path)
    assert len(measured) == 6


def test_the_same_seed_gives_the_same_table_on_the_shipped_model() -> None:
    model, params = ip.load("tiny")
    stacks = {"int4": "quantize(bits=4, group=32)"}
    one, two, timed = (
        ip.ablate(model, params, stacks, tokens=600, metrics=QUALITY + speed) for speed in ([], [], ["decode"])
    )
    assert str(one) == str(two)
    assert one.to_json() == two.to_json()
    assert [row.scores for row in timed.rows] == [row.scores for row in one.rows]
    assert one["int4"].scores.kl.value > 1e-3
    assert "held-out topics of CPython" in one.title


def test_speed_is_taken_in_turn_with_the_bases() -> None:
    row = ablate({"int8": "quantize(bits=8)"}, metrics=["kl", "decode", "greedy"])["int8"]
    assert len(row.speed) == run.TURNS
    assert all(own > 0 and base > 0 for own, base in row.speed)
    assert min(own / base for own, base in row.speed) <= row.faster <= max(own / base for own, base in row.speed)
    assert row.greedy is not None and len(row.greedy.lengths) == run.PROMPTS


@dataclasses.dataclass(frozen=True, repr=False)
class Spoil(ip.Transform):
    """Makes a weight NaN."""

    name: ClassVar[str] = "spoil"

    @property
    def exact(self) -> bool:
        return False

    def check(self, spec: ip.Spec) -> None: ...

    def edit(self, spec: ip.Spec) -> ip.Spec:
        return spec

    def params(self, weights: Any, before: ip.Model, after: ip.Spec, **extra: Any) -> Any:
        return weights.map(["layers.1.mlp.up"], lambda name, w: w * jnp.nan)

    def __repr__(self) -> str:
        return "spoil()"


def test_a_row_whose_figures_are_none_says_so_and_the_run_goes_on(tmp_path: Path) -> None:
    table = ablate({"spoilt": Spoil(), "int8": "quantize(bits=8)"}, out=tmp_path)
    assert table.cells[1]["ppl"] == table.cells[1]["KL"] == table.cells[1]["same top-1"] == "nan"
    assert any(note.startswith("spoilt: its logits are not finite") for note in table.notes)
    assert table.cells[2]["KL"] != "nan"
    assert str(ip.Table.from_json((tmp_path / "rows.jsonl").read_text(), QUALITY)) == str(table)
    table.save(tmp_path)


def test_a_stack_can_be_the_base() -> None:
    base = ip.quantize(bits=8)(MODEL)
    table = ip.ablate(base, base.convert(PARAMS), {"kv": "cache_kv(bits=8)"}, text=TEXT, metrics="kl", length=32)
    assert [row.name for row in table.rows] == ["base", "kv"]
    assert table["base"].scores.kl.value == 0 < table["kv"].scores.kl.value


def test_a_stack_gets_the_params_that_it_asks_for_and_the_others_none() -> None:
    small = ip.models.llama(layers=1, dim=16, heads=1, kv_heads=1, head_dim=16, mlp=16, vocab=61, context=64)
    stacks = {"int8": "quantize(bits=8)", "guess": ip.cache_kv() | ip.speculative(draft=ip.cache_kv()(small), k=2)}
    table = ablate(stacks, metrics=["kl"], draft=small.init(jax.random.key(2)))
    assert table["guess"].scores.kl.value < 1e-6 < table["int8"].scores.kl.value
    with pytest.raises(EvaluationError, match="its stacks need draft"):
        ablate(stacks)


def test_the_standard_table_is_of_stacks_that_can_be_made() -> None:
    model, params = ip.load("tiny")
    assert list(run._made(model, params, None)) == ["fp32", *STANDARD]
    made = run._made(model, params, STANDARD | MORE)
    assert len(made) == 1 + len(STANDARD) + len(MORE)
    assert len({(stack.spec, stack.recipe) for stack in made.values()}) == len(made)


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metrics": ["ppl", "kll"]}, "no metric 'kll'.*did you mean 'kl'"),
        ({"text": TEXT[:20]}, "too short"),
        ({"text": [70] * 200}, "outside the vocabulary"),
        ({"text": None}, "no tokenizer, and no text"),
        ({"tokens": -1}, "tokens=-1"),
        ({"stacks": {"fp32": "quantize(bits=8)"}}, "a stack is named 'fp32'"),
        ({"stacks": {"x": 3}}, "'x' is a int"),
        ({"length": 65}, "65"),
        ({"metrics": ["bits_per_byte"]}, "bits a byte cannot be measured"),
        ({"stacks": {"x": ip.cache_kv()(ip.models.llama(vocab=61))}}, "'x' is a stack of another model"),
        ({"draft": {}}, "ablate was given \\['draft'\\]"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InfoptError, match=f"(?s){message}") as e:
        ablate(**options, out=tmp_path / "rows")
    assert e.value.why and e.value.fix


def test_a_stack_that_cannot_be_made_is_named_before_anything_is_measured(measured: list[str]) -> None:
    with pytest.raises(TransformOrderError, match="twice: quantize"):
        ablate({"int8": "quantize(bits=8)", "twice": "quantize(bits=8) | quantize(bits=4, group=16)"})
    with pytest.raises(InfoptError, match="odd: group=24 does not divide"):
        ablate({"odd": "quantize(bits=4, group=24)"})
    with pytest.raises(InfoptError, match="mxfp5"):
        ablate({"unknown": "quantize(format='mxfp5')"})
    assert measured == []


def test_a_folder_with_rows_of_another_model_is_refused(tmp_path: Path) -> None:
    ablate({}, out=tmp_path)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(EvaluationError, match="holds rows of another model"):
        ip.ablate(MODEL, MODEL.init(jax.random.key(1)), {}, text=TEXT, out=tmp_path, metrics=["ppl"])
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_folder_whose_rows_are_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"name": 3}\n')
    with pytest.raises(EvaluationError, match="holds what is no row"):
        ablate({}, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, measured: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="rows cannot be written"):
        ablate({}, out=tmp_path / "file" / "rows")
    with pytest.raises(CheckpointError, match="cannot be written"):
        ablate({}, out="/proc/rows")
    assert measured == []


def test_a_text_that_a_method_read_is_not_measured_on() -> None:
    model = ip.models.llama(vocab=32, context=64)
    params, text = model.init(jax.random.key(0)), np.random.default_rng(0).integers(0, 32, 600)
    method = ip.gptq(text[:200], tokens=128, length=64)
    for how in (method, ip.distilled(text[400:], tokens=128, length=64, start=method)):
        stack = ip.quantize(bits=4, group=32, method=how) | ip.cache_kv()
        with pytest.raises(EvaluationError, match="mine: calibration and evaluation overlap"):
            ip.ablate(model, params, {"mine": stack}, text=text[100:400].tolist(), metrics=["ppl"])
    table = ip.ablate(model, params, {"mine": stack}, text=text[200:400].tolist(), metrics=["ppl"])
    assert len(table.rows) == 2
    short = ip.quantize(bits=4, group=32, method=ip.gptq(text[:8], length=8))
    with pytest.raises(EvaluationError, match="1 runs of 8 tokens") as e:  # a phrase, that may be chance
        ip.ablate(model, params, {"mine": short}, text=text[:200].tolist(), metrics=["ppl"])
    assert "length=32" in e.value.fix
    for length in (16, 31):  # windows that hold no 32 tokens
        with pytest.raises(EvaluationError, match=f"runs of {length} tokens"):
            ip.ablate(model, params, {"mine": stack}, text=text[400:].tolist(), length=length, metrics=["ppl"])
    draft = ip.cache_kv() | ip.speculative(draft=ip.self_draft(ip.quantize(bits=4, group=32, method=method)))
    with pytest.raises(EvaluationError, match="calibration and evaluation overlap"):
        ip.ablate(model, params, {"mine": draft}, text=text[:200].tolist(), metrics=["ppl"])


def test_a_row_of_a_method_is_measured_anew_by_other_code(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ip.gptq(np.arange(64) % 61, tokens=64, length=32)
    rows = {"gptq": ip.quantize(bits=4, group=16, method=method), "int8": "quantize(bits=8)"}
    ablate(rows, out=tmp_path)
    ablate(rows, out=tmp_path)
    assert measured == ["fp32", "gptq", "int8"]
    monkeypatch.setattr("infopt.ablation.run.source", lambda *_: "changed")
    ablate(rows, out=tmp_path)
    assert measured == ["fp32", "gptq", "int8", "gptq"]
