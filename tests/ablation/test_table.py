"""What a table shows: cells, notes, numbers, a picture; and that files are there whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infopt as ip
from infopt.ablation.table import Row, Table, write
from infopt.errors import CheckpointError, EvaluationError
from infopt.evaluate import Scores

ABOUT = {
    "model": {"what": "toy (llama 1 x 8)", "digest": "d"},
    "text": {"what": "a text", "digest": "0123456789", "scored": 400, "windows": 4, "length": 100},
    "versions": {"jax": "0"},
    "device": "cpu (2 cores)",
    "decoding": "greedily, one text",
}


def row(name: str, kl: float = 0.0, nll: float = 2.0, speed: float = 0.0, units: int = 25, **fields: Any) -> Row:
    rng = np.random.default_rng(len(name))
    per = tuple((100 * nll * rng.uniform(0.9, 1.1, units)).tolist())
    scores = Scores(
        "w",
        tuple(range(units)),
        (100,) * units,
        per,
        None,
        (100 * kl,) * units,
        (99.0,) * units,
        ((3 * kl,),) * units,
        kl,
    )
    known: dict[str, Any] = dict(
        name=name, key=name, stack=f"{name}()", spec={"weights": []}, recipe=[], exact=not kl, weight_bytes=400,
        weights=100, error=kl, token_bytes=64, state_bytes=640, scores=scores, greedy=None,
        speed=((speed, 2.0), (speed, 4.0), (speed, 4.0)) if speed else (), about=ABOUT,
    )  # fmt: skip
    return Row(**known | fields)


PACKED = {"spec": {"weights": [["layers.0.mlp.up", {}]]}, "weight_bytes": 130}
TABLE = Table(
    (row("fp32", speed=4.0), row("int8", kl=0.01, nll=2.1, speed=2.0, **PACKED), row("kv", kl=1e-9, speed=8.0)),
    ("ppl", "kl", "kl99", "top1", "decode"),
)


def test_cells_hold_bytes_quality_and_speed() -> None:
    base, int8, _ = TABLE.cells
    assert (base["bytes/weight"], base["kv/token"]) == ("4.000", "64 B")
    assert int8["bytes/weight"] == "1.300"
    assert int8["KL"].startswith("0.01")
    assert int8["decoded/s"] == "2 (0.50x)"  # the median of 1, 1/2 and 1/2: of the turns, not of their medians
    assert base["ppl to fp32"] == "-"
    assert "%" in int8["ppl to fp32"]


def test_text_markdown_and_a_notebook_show_the_same_cells() -> None:
    text, markdown = str(TABLE), TABLE.to_markdown()
    assert repr(TABLE) == text
    assert TABLE._repr_markdown_() == markdown
    for cells in TABLE.cells:
        assert all(cell in text and cell in markdown for cell in cells.values())
    assert text.startswith("toy (llama 1 x 8), on a text: 400 tokens in 4 windows of 100 (digest 01234567)")
    lines = text.splitlines()[1:5]
    assert len({len(line) for line in lines}) == 1


def test_csv_holds_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(TABLE.to_csv())))
    assert [each["name"] for each in rows] == ["fp32", "int8", "kv"]
    e = TABLE["int8"].scores.kl
    assert (float(rows[1]["kl"]), float(rows[1]["kl_low"])) == (e.value, e.low)
    change = TABLE.difference("int8", "fp32", relative=True)
    assert (float(rows[1]["ppl_change"]), float(rows[1]["ppl_change_high"])) == (change.value, change.high)
    assert float(rows[1]["faster"]) == 0.5


def test_rows_go_through_json_unchanged() -> None:
    again = Table.from_json(TABLE.to_json(), TABLE.metrics)
    assert again.rows == TABLE.rows
    assert str(again) == str(TABLE)


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no row of an ablation"):
        Row.from_json('{"name": "x"}')
    with pytest.raises(EvaluationError, match="there is no row"):
        Table.from_json("\n")
    with pytest.raises(EvaluationError, match=r"no row 'int9'.*\n.*\n.*did you mean 'int8'"):
        TABLE["int9"]


def test_notes_say_what_a_reader_must_know() -> None:
    assert any("Slower than dense" in note for note in TABLE.notes)
    assert not any("as they are" in note for note in TABLE.notes)
    kv = row("kv", kl=1e-9, speed=8.0)
    quiet = Table((TABLE.rows[0], kv), ("ppl", "decode"))
    assert len(quiet.notes) == 2  # and how speed was taken
    lossless = Table((TABLE.rows[0], row("q4_1", kl=1e-9, **PACKED)), ("ppl", "kl"))
    assert any(note.startswith("q4_1: the weights lie on this grid") for note in lossless.notes)
    few = Table((row("fp32", units=5), row("int8", kl=0.1, units=5)), ("kl",))
    assert "5 are few" in few.notes[0]
    noisy = Table((row("fp32", kl=1e-7), row("int8", kl=0.1)), ("kl",))
    assert "noise floor" in noisy.notes[1]
    spoilt = Table((row("fp32", kl=math.nan), row("int8", kl=math.nan)), ("kl",))
    assert [note.split(":")[0] for note in spoilt.notes[1:]] == ["fp32", "int8"]


def test_a_name_with_a_bar_is_one_cell_of_markdown() -> None:
    table = Table((row("fp32"), row("quantize(bits=4) | cache_kv(bits=8)", kl=0.1)), ("ppl", "kl"))
    lines = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_what_is_no_number_goes_through_json() -> None:
    line = row("kept", error=math.nan).to_json()
    json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert math.isnan(Row.from_json(line).error)


def test_a_gpus_table_does_not_speak_of_the_cpu() -> None:
    about = ABOUT | {"device": "NVIDIA H100"}
    rows = tuple(dataclasses.replace(row, about=about) for row in TABLE.rows)
    assert not any("Slower" in note for note in Table(rows, TABLE.metrics).notes)


def test_the_picture_has_a_point_with_its_interval_a_row_and_a_bar_where_speed_was_taken() -> None:
    left, right = TABLE.plot("ppl").axes
    assert len(left.containers) == 3
    widths = [bar.get_width() for bar in right.patches]  # type: ignore[attr-defined]
    assert widths == [row.faster for row in TABLE.rows]
    (alone,) = Table((row("fp32"), row("int8", kl=0.1))).plot("kl").axes
    assert len(alone.containers) == 1  # the base's KL is nothing
    assert alone.get_yscale() == "log"
    with pytest.raises(EvaluationError, match="no metric 'kll' can be drawn"):
        TABLE.plot("kll")


def test_a_table_is_saved_as_csv_markdown_and_a_picture(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["table.csv", "table.md", "table.png"]
    assert (tmp_path / "new" / "table.csv").read_text() == TABLE.to_csv()
    assert (tmp_path / "new" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, b"before")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="cannot be written") as e:
        write(path, b"after")
    assert "free some space" in e.value.fix
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_public_names_are_these() -> None:
    assert ip.Table is Table
    assert callable(ip.ablate)
