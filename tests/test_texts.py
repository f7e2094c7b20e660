"""Text that every CPython carries, in splits that stay apart."""

from __future__ import annotations

import pytest

from infopt import texts
from infopt.errors import InfoptError


def paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def test_splits_share_no_paragraph_and_none_holds_one_twice() -> None:
    of = {split: paragraphs(texts.topics(split)) for split in texts.SPLITS}
    everything = [paragraph for found in of.values() for paragraph in found]
    assert len(everything) == len(set(everything)) > 2000
    assert not set(paragraphs("\n\n".join(texts.docstrings()))) & set(everything)


def test_every_split_is_long_enough_for_its_use() -> None:
    assert len(texts.topics()) >= 80_000
    assert len(texts.topics("calibration")) >= 40_000
    assert len(texts.topics("training")) >= 150_000 and sum(map(len, texts.docstrings())) >= 1_000_000


def test_a_topics_split_is_that_of_its_name_in_every_cpython() -> None:
    """The shipped weights were trained by it: a change here makes training text of what is held out."""
    wanted = {
        "specialnames": "heldout",
        "typesseq": "heldout",
        "class": "heldout",
        "types": "training",
        "in": "training",
        "compound": "training",
    }
    assert {topic: texts.split_of(topic) for topic in wanted} == wanted


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InfoptError, match="no split 'held_out'") as caught:
        texts.topics("held_out")
    assert "heldout" in caught.value.fix


def test_a_digest_tells_texts_apart() -> None:
    assert texts.digest("a") != texts.digest("b") and len(texts.digest("a")) == 12
