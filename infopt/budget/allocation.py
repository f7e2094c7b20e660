"""A format for each matrix under a budget, in few runs of layers: Lagrange's multiplier, then exchanges."""

from __future__ import annotations

import numpy as np

HALVINGS = 50
"""Of the interval in which the multiplier lies, on a scale of orders of magnitude."""
EPS = 1e-15
"""KL below which an exchange is no gain."""


def allocate(kl: np.ndarray, bits: np.ndarray, groups: np.ndarray, budget: float, most: int) -> np.ndarray:
    """Formats that cost the least KL, if KL adds up, within a budget and a number of runs.

    For a price of a bit, the cheapest runs are found exactly: within a run each key has its own best format, and which
    runs is a shortest path. The price is halved towards the budget (Everett 1963, "Generalized Lagrange multiplier
    method"). What a price leaves over is spent by exchanging the formats of one run's key, or of two, while that pays.

    Args:
      kl, bits: `[B, K, F]` of each block, key and format.
      groups: `[B]`; a run holds blocks of one group.
      budget: bits of all together; at least the sum of the least.
      most: runs, at least as many as changes of group.

    Returns:
      The number of a format, `[B, K]`; the same for the same arguments.
    """
    prefixes = [np.concatenate([np.zeros((1, *x.shape[1:])), np.cumsum(x, 0)]) for x in (kl, bits)]
    apart = _apart(groups)

    def cheapest(price: float) -> np.ndarray:
        return _runs(prefixes[0] + price * prefixes[1], apart, most)

    def fits(choice: np.ndarray) -> bool:
        return _total(bits, choice) <= budget

    def narrowed(choice: np.ndarray) -> np.ndarray:
        """The same runs, a format narrower where that costs least a bit, until it fits."""
        starts, of_runs = _of_runs((kl, bits), groups, choice)
        own = choice[starts]
        while (over := _total(of_runs[1], own) - budget) > 0:
            loss, saved = (sign * _changes(x, own) for sign, x in zip((1, -1), of_runs))
            each = np.where(saved > 0, loss / np.minimum(np.maximum(saved, 1e-9), over), np.inf)
            run, key, form = np.unravel_index(each.argmin(), each.shape)
            own[run, key] = form
        return np.repeat(own, np.diff(np.append(starts, len(groups))), 0)

    low, high = 0.0, float(kl.sum() + EPS)  # a bit at least is saved, so none is worth more
    found = [cheapest(low)]
    if not fits(found[0]):
        found += [cheapest(high)]
        low = high * 1e-30
        for _ in range(HALVINGS):
            price = float(np.sqrt(low * high))
            found.append(cheapest(price))
            low, high = (low, price) if fits(found[-1]) else (price, high)
    distinct = {choice.tobytes(): choice for choice in map(narrowed, found)}.values()
    polished = [_exchanged(kl, bits, groups, budget, choice) for choice in distinct]
    return min(polished, key=lambda choice: (_total(kl, choice), _total(bits, choice)))


def _total(x: np.ndarray, choice: np.ndarray) -> float:
    return float(np.take_along_axis(x, choice[..., None], 2).sum())


def _changes(x: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """How much more it is, for each format in place of the chosen one."""
    return x - np.take_along_axis(x, choice[..., None], 2)


def _of_runs(
    each: tuple[np.ndarray, ...], groups: np.ndarray, choice: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where the runs of a choice begin, and sums over each of them."""
    new = np.any(choice[1:] != choice[:-1], 1) | (groups[1:] != groups[:-1])
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return starts, [np.add.reduceat(x, starts, 0) for x in each]


def _apart(groups: np.ndarray) -> np.ndarray:
    """`[B + 1, B + 1]`: whether blocks i to j, without j, are no run."""
    blocks = len(groups)
    at = np.arange(blocks + 1)
    changes = np.concatenate([[0, 0], np.cumsum(groups[1:] != groups[:-1])])  # before block j - 1, at j
    first = np.append(changes[1:], -1)
    return (at[:, None] >= at[None]) | (first[:, None] != changes[None])


def _runs(cost: np.ndarray, apart: np.ndarray, most: int) -> np.ndarray:
    """The cheapest choice, of prefix sums `[B + 1, K, F]`."""
    blocks, keys = cost.shape[0] - 1, cost.shape[1]
    each = cost[None] - cost[:, None]
    run = np.where(apart, np.inf, each.min(-1).sum(-1))
    best, back = np.full((most + 1, blocks + 1), np.inf), np.zeros((most + 1, blocks + 1), int)
    best[0, 0] = 0
    for s in range(1, most + 1):
        ways = best[s - 1][:, None] + run
        back[s], best[s] = ways.argmin(0), ways.min(0)
    s, j = int(best[:, blocks].argmin()), blocks
    choice = np.zeros((blocks, keys), int)
    while j:
        i = int(back[s, j])
        choice[i:j] = each[i, j].argmin(-1)
        s, j = s - 1, i
    return choice


def _exchanged(kl: np.ndarray, bits: np.ndarray, groups: np.ndarray, budget: float, choice: np.ndarray) -> np.ndarray:
    """The choice with the formats of one run's key, or of two, exchanged for others as long as KL falls."""
    starts, of_runs = _of_runs((kl, bits), groups, choice)
    own = choice[starts]
    runs, keys, forms = of_runs[0].shape
    place = np.append(np.repeat(np.arange(runs * keys), forms), -1)  # the last one is no exchange
    while True:
        less, more = (  # of KL and of bits, if this key of a run had that format
            np.append(_changes(x, own), 0.0) for x in of_runs
        )
        room = budget - _total(of_runs[1], own)
        possible = (place[:, None] != place[None]) & (more[:, None] + more[None] <= room)
        both = np.where(possible, less[:, None] + less[None], np.inf)
        pair = np.unravel_index(both.argmin(), both.shape)
        if not both[pair] < -EPS:
            return np.repeat(own, np.diff(np.append(starts, len(groups))), 0)
        for move in map(int, pair):
            if place[move] >= 0:
                own[np.unravel_index(place[move], (runs, keys))] = move % forms
