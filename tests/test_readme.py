"""What the README prints, it prints from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infopt import cli
from infopt.io import gguf, huggingface

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_families_is_the_registrys(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"<!-- families: .*? -->\n(.*?)<!-- /families -->", README.read_text("utf-8"), re.S)
    assert block is not None
    assert cli.main(["families"]) == 0
    assert block[1] == capsys.readouterr().out, "infopt families prints what belongs there"


def test_the_table_leaves_no_family_and_no_format_out(
    capsys: pytest.CaptureFixture[str], own_families: frozenset[str]
) -> None:
    cli.main(["families"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows} == own_families
    assert {kind for row in rows for kind in re.findall("`(.*?)`", row[2])} == {*huggingface.MODEL_TYPES}
    assert {arch for row in rows for arch in re.findall("`(.*?)`", row[3])} == {*gguf.CONFIGS}
