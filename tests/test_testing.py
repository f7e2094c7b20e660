"""The contract as a user meets it: for a transform of their own, in a file of its own."""

import dataclasses
from typing import ClassVar

import pytest

import infopt as ip
from infopt import testing


@pytest.fixture(scope="module")
def shuffle(example):
    return example("own_transform").ShuffleNeurons


def test_a_transform_of_ones_own_passes_the_contract(shuffle):
    testing.check_transform(shuffle(7), families=["llama"], partners=False)


def test_it_stacks_with_the_library(shuffle):
    bare, params = testing.base_of("llama")
    stack = (shuffle(7) | ip.sliding_window(6) | ip.quantize(bits=8) | ip.cache_kv(bits=8))(bare)
    testing.verify(stack, stack.convert(params), generation=False)
    with pytest.raises(ip.TransformOrderError, match=r"shuffle_neurons\(seed=7\) needs dense weights"):
        (ip.quantize(bits=8) | shuffle(7))(bare)


@dataclasses.dataclass(frozen=True, repr=False)
class Liar(ip.Transform):
    """Says that it is exact, and narrows the window."""

    name: ClassVar[str] = "liar"

    @property
    def exact(self):
        return True

    def check(self, spec):
        pass

    def edit(self, spec):
        return ip.sliding_window(3).edit(spec)


@dataclasses.dataclass(frozen=True, repr=False)
class Sullen(Liar):
    """Refuses without a reason, or without a way out."""

    name: ClassVar[str] = "sullen"
    why: str = ""
    fix: str = ""

    def check(self, spec):
        raise ip.InfoptError("no.", why=self.why, fix=self.fix)


def test_a_transform_that_is_not_as_exact_as_it_says_fails():
    with pytest.raises(testing.Mismatch, match="says that it is exact"):
        testing.check_transform(Liar(), families=["llama"], partners=False)


@pytest.mark.parametrize("said", [{"fix": "go away"}, {"why": "I will not"}])
def test_a_refusal_without_a_reason_or_a_fix_fails(said: dict[str, str]):
    with pytest.raises(testing.Mismatch, match="without a reason or a fix"):
        testing.check_transform(Sullen(**said), families=["llama"], partners=False)


def test_the_table_counts_what_was_seen():
    seen = [
        testing.Outcome("llama", ("gqa(kv_heads=1)",), "equal", "", "a"),
        testing.Outcome("llama | cache_kv()", ("gqa(kv_heads=1)",), "equal", "", "b"),
        testing.Outcome("llama", ("quantize(bits=8)", "gqa(kv_heads=1)"), "refused", "x; why: pooled; fix: y"),
    ]
    assert testing.totals(seen) == {"orders": 3, "refused": 1, "equal": 2, "failed": 0, "stacks": 2}
    text = testing.markdown({("llama", 2): seen})
    assert "| llama | up to 2 | 3 | 1 | 2 | 0 | 2 |" in text
    assert "| pooled | 1 |" in text
