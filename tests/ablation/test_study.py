"""Studies out of TOML, and the trade-offs of each transform alone."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import infopt as ip
from infopt import cli
from infopt.ablation import study, tradeoffs
from infopt.ablation.study import read_study
from infopt.errors import EvaluationError, InfoptError

STUDY = """
models = ["tiny"]
texts = ["topics", "own.txt"]
metrics = ["ppl", "kl"]
tokens = 300
length = 64

[stacks]
"8-bit kv" = "cache_kv(bits=8)"

[grid]
stack = "quantize(bits={bits}, group={group})"
bits = [8, 4]
group = [32]
"""


def test_a_study_is_every_model_on_every_text_with_every_stack(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "own.txt").write_text("The lambda keyword makes a function. " * 60)
    tables = study(tmp_path / "study.toml", tmp_path / "out")
    assert list(tables) == [("tiny", "topics"), ("tiny", "own.txt")]
    for table in tables.values():
        names = ["8-bit kv", "quantize(bits=8, group=32)", "quantize(bits=4, group=32)"]
        assert [row.name for row in table.rows] == ["fp32", *names]
    for folder in ("topics", "own.txt"):
        files = sorted(path.name for path in (tmp_path / "out" / "tiny" / folder).iterdir())
        assert files == ["rows.jsonl", "table.csv", "table.md", "table.png"]
    assert "a text of one's own" in tables["tiny", "own.txt"].title


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("metrics", "metric", "nothing is called 'metric'.*did you mean 'metrics'"),
        ('models = ["tiny"]', "", "models = \\[\\] is no list"),
        ('models = ["tiny"]', 'models = "tiny"', "models = 'tiny' is no list"),
        ("tokens = 300", "tokens = 1.5", "tokens = 1.5 is no count"),
        ("group = [32]", "", "names bits, group in its stack, and lists bits"),
        ("group = [32]", "group = [32]\nkv = [8]", "lists bits, group, kv"),
        ("group = [32]", "group = []", "names bits, group in its stack"),
        ("stack =", "stacks =", "has no stack"),
        ('"8-bit kv" = "cache_kv(bits=8)"', '"8-bit kv" = 8', "does not hold texts"),
        ("models", "= models", "cannot be read"),
    ],
)
def test_a_study_that_asks_for_what_is_unknown_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace(old, new, 1))
    with pytest.raises(EvaluationError, match=f"(?s)study.toml.*{message}") as e:
        read_study(path)
    assert e.value.why and e.value.fix


def test_a_text_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace("tiny", "no such model"))
    with pytest.raises(EvaluationError, match=r"the text own\.txt cannot be read"):
        study(tmp_path / "study.toml", tmp_path / "out")


def test_the_tradeoffs_are_each_technique_alone() -> None:
    model = ip.models.llama(layers=1, dim=64, heads=4, kv_heads=4, head_dim=16, mlp=64, vocab=61, context=64)
    text = np.random.default_rng(0).integers(0, 61, 400).tolist()
    found = tradeoffs(model, model.init(jax.random.key(0)), text=text, length=32)
    cells = {row["technique"]: row for row in found.cells}
    assert list(cells) == [
        "KV cache", "FP16 weights", "INT8 weights", "INT4 weights", "8-bit KV", "4-bit KV", "sliding window",
        "fewer KV heads", "paged KV", "speculative",
    ]  # fmt: skip
    assert [name for name, row in cells.items() if row["exact"] == "yes"] == ["KV cache", "paged KV", "speculative"]
    table = found.table
    assert table["no cache"].state_bytes == 0
    assert cells["KV cache"]["decoding speed"] == f"{1 / table['no cache'].faster:.2f}x"
    assert cells["8-bit KV"]["keys and values"].endswith(f"({18 / 64:.2f}x)")
    assert cells["fewer KV heads"]["keys and values"].endswith("(0.50x)")
    for exact in ("paged KV", "speculative"):
        assert table[exact].scores.kl.value < 1e-6
    assert str(found) in f"{found!r}"
    assert found.to_markdown().count("\n|") == 2 + len(cells) - 1 + 1


def test_tradeoffs_of_a_stack_are_refused() -> None:
    model = ip.cache_kv()(ip.models.llama())
    with pytest.raises(InfoptError, match=r"the trade-offs of cache_kv\(\)"):
        tradeoffs(model, {})


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_COMPILE_CACHE", "0")


ASK = ["ablate", "tiny", "--tokens", "300", "--length", "64", "--metrics", "ppl,kl"]


def test_the_command_prints_a_table_and_writes_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*ASK, "--stack", "eight=quantize(bits=8)", "--stack", "cache_kv(bits=8)"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny (llama")
    assert [line.split("  ")[0] for line in out.splitlines()[2:5]] == ["fp32", "eight", "cache_kv(bits=8)"]
    assert err == "picture: ablation.png\n"
    assert (tmp_path / "ablation.png").exists()


def test_the_command_keeps_rows_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [*ASK, "--stack", "quantize(bits=8)", "--out", str(tmp_path / "report"), "--json"]
    assert cli.main(ask) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["fp32", "quantize(bits=8)"]
    assert {"spec", "recipe", "scores", "about"} <= set(rows[0])
    assert {"seed", "versions", "device", "commit", "text"} <= set(rows[0]["about"])
    kept = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert kept == ["rows.jsonl", "table.csv", "table.md", "table.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metrics", "pppl"], "did you mean 'ppl'"),
        (["--stack", "quantise(bits=8)"], "did you mean 'quantize'"),
        (["--text", "/nowhere"], "/nowhere cannot be read"),
        (["--tradeoffs", "--stack", "cache_kv()"], "--tradeoffs was given stacks or metrics"),
        (["--stack", "a=cache_kv()", "--stack", "a=cache_kv(bits=8)"], "two stacks are named 'a'"),
        (["--study", "s.toml", "--text", __file__], "--study was given --text too"),
        (["tiny", "--study", "s.toml", "--picture", "a.png"], "--study was given tiny, --picture too"),
        (["--study", "s.toml"], "--study was given no folder"),
        (["--out", "report", "--picture", "a.png"], "--picture was given beside --out"),
    ],
)
def test_a_mistake_costs_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert message in err
