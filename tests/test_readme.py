"""What the README prints, it prints from the code."""

from __future__ import annotations

import re
from pathlib import Path

from infopt.library import families_table

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_families_is_the_registrys() -> None:
    block = re.search(r"<!-- families: .*? -->\n(.*?)\n<!-- /families -->", README.read_text("utf-8"), re.S)
    assert block is not None
    assert block[1] == families_table(), "infopt families prints what belongs there"
