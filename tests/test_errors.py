"""What messages are made of."""

from __future__ import annotations

import pytest

from infopt.errors import human


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (140_544, "141 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (16_060_522_496, "16.1 GB"),
        (80e9, "80 GB"),
        (2.5e12, "2.5 TB"),
        (9e15, "9 PB"),
        (2**63, "9.22 EB"),
    ],
)
def test_bytes_are_three_digits_in_powers_of_1000(size: float, text: str) -> None:
    assert human(size) == text
