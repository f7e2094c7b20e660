"""What examples/ladder.py keeps of its tables: parts taken one after another make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def told(title: str, **kl: float) -> dict[str, Any]:
    rows = [
        {
            "name": name.replace("_", " ").replace("|", ", "),
            "bytes_a_weight": 1.25,
            "kl": [x, x - 0.01, x + 0.01],
            "ppl": [x] * 3,
        }
        for name, x in kl.items()
    ]
    return {"model": "tiny", "title": title, "rows": rows}


FIRST = told("here", **{"3_bits|32|gptq": 0.1, "3_bits|32|rounded": 0.2})
SECOND = told("here", **{"4_bits|64|rounded": 0.05, "3_bits|32|gptq": 0.11, "4_bits|32|gptq, distilled|rotated": 0.01})


def test_parts_make_one_table_in_the_ladders_order(tmp_path: Path, example: Any) -> None:
    ladder, file = example("ladder"), tmp_path / "ladder.json"
    assert ladder.merged(FIRST, file)["rows"] == FIRST["rows"][::-1]
    file.write_text(json.dumps(FIRST))
    rows = {row["name"]: row["kl"][0] for row in ladder.merged(SECOND, file)["rows"]}
    assert list(rows.items()) == [
        ("4 bits, 32, gptq, distilled, rotated", 0.01),
        ("4 bits, 64, rounded", 0.05),
        ("3 bits, 32, rounded", 0.2),
        ("3 bits, 32, gptq", 0.11),  # what was taken last
    ]


def test_tables_of_another_text_are_not_mixed(tmp_path: Path, example: Any) -> None:
    (tmp_path / "ladder.json").write_text(json.dumps(FIRST))
    with pytest.raises(SystemExit, match="is of here, this run of there"):
        example("ladder").merged(told("there"), tmp_path / "ladder.json")


def test_what_was_not_taken_is_an_empty_cell(tmp_path: Path, example: Any) -> None:
    (tmp_path / "ladder.json").write_text(json.dumps(FIRST))
    ladder = example("ladder")
    (tmp_path / "ladder.json").write_text(json.dumps(ladder.merged(SECOND, tmp_path / "ladder.json")))
    lines = ladder.page([tmp_path / "ladder.json"]).splitlines()
    (row,) = (line for line in lines if line.startswith("| 4 bits, 64 |") and "±" in line and "%" not in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.0500 ± 0.0100", "", ""]  # rounded, gptq, and rotated
    assert "| 4 bits, 64 | 1.250 |  |" in lines
