"""The promise: every order of transforms is refused with a reason, or equals its oracle."""

import itertools
import random

import pytest

from infopt import testing
from infopt.errors import InfoptError

pytestmark = pytest.mark.usefixtures("small_blocks")

PAIRS, TRIPLES = 8, 4  # stacks sampled here for each family; all of them run in `infopt matrix --check`


def stacks(family):
    """Accepted orders by their Spec, one group a test: equal Specs share a compilation."""
    bare, _ = testing.base_of(family)
    from infopt.transforms import cache_kv

    bases = {"bare": bare, "cached": cache_kv()(bare)}
    pairs = testing.everything(2)
    triples = [t for t in testing.everything(3) if len(t[1]) == 3]
    random.Random(20).shuffle(triples)
    groups, extra = {}, {}
    for on, order in pairs + triples:
        try:
            spec = testing.apply_order(bases[on], order).spec
        except InfoptError:
            continue
        if len(order) < 3:
            groups.setdefault(spec, []).append((on, order))
        elif spec not in groups and len(extra) < TRIPLES:
            extra.setdefault(spec, [(on, order)])
    chosen = random.Random(family).sample(list(groups), PAIRS)
    return {spec: groups[spec] for spec in chosen} | extra


GROUPS = [(family, group) for family in testing.FULL for group in stacks(family).values()]


def name(value):
    return value if isinstance(value, str) else f"{value[0][0]}-{' | '.join(map(repr, value[0][1]))}"


@pytest.mark.parametrize(("family", "group"), GROUPS, ids=name)
def test_stack_equals_its_oracle(family, group):
    for outcome in testing.check_orders(family, group):
        assert outcome.status == "equal", outcome.detail


@pytest.mark.parametrize("choices", testing.covering(), ids=", ".join)
def test_every_pair_of_attentions_settings_equals_its_oracle(choices):
    """The product of all of them runs in `infopt matrix --write` and `--check`."""
    with testing.small_blocks(2**18):  # "plain" is then at once, and "flash" by block
        outcome = testing.check_combination(choices)
    assert outcome.status == "equal", outcome.detail


def test_the_combinations_that_are_tried_hold_every_pair_of_choices():
    tried = testing.covering()
    for i, j in itertools.combinations(range(len(testing.PRODUCT)), 2):
        one, two = (list(testing.PRODUCT.values())[n] for n in (i, j))
        assert {(each[i], each[j]) for each in tried} == set(itertools.product(one, two))


@pytest.mark.parametrize("family", [f for f in testing.FAMILIES if f not in testing.FULL])
def test_every_family_stacks(family):
    """Weights, window, codec and pages at once; each transform alone and some pairs run in `infopt matrix --check`."""
    from infopt import transforms as t

    sinks = 0 if testing.base_of(family)[0].spec.config.rotated_queries else 2
    stack = (t.quantize(bits=4, group=16), t.sliding_window(5, sinks=sinks), t.cache_kv(bits=8), t.paged(4))
    (outcome,) = testing.check_orders(family, [("bare", stack)])
    assert outcome.status == "equal", outcome.detail


@pytest.mark.parametrize("family", testing.FULL)
def test_refusals_give_a_reason_and_a_fix(family):
    refused = 0
    bare, _ = testing.base_of(family)
    for _, order in testing.everything(2):
        try:
            testing.apply_order(bare, order)
        except InfoptError as e:
            refused += 1
            assert repr(order[-1])[:6] in e.what or repr(order[-2])[:6] in e.what
            assert e.fix
    assert refused > 50
