"""What is said of an architecture that is not computed here: the nearest one that is, and what differs.

Nobody keeps a list of what a family's config may say. Its reader is let loose on the foreign config instead, and what
it asks for is noted: what it never asks for, it does not know.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infopt.errors import CheckpointError

INERT = frozenset((
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "hidden_dropout", "initializer_range", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "reorder_and_upcast_attn",
    "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "torch_dtype",
    "transformers_version", "use_cache",
))  # fmt: skip
"""Keys of a config.json that say nothing of what is computed."""
SIZES = frozenset((
    "hidden_size", "intermediate_size", "n_embd", "n_head", "n_layer", "num_attention_heads", "num_hidden_layers",
    "vocab_size",
))  # fmt: skip
"""Keys of a config.json that a foreign config lacks where it lacks them: a reader may have a default for its own."""
SHOWN = 6
"""Names of each kind that a message lists."""
NEAREST = 4
"""Known architectures, the nearest by their configs, whose tensors are compared."""


class Asked(dict[str, Any]):
    """A config that notes what is asked of it."""

    def __init__(self, values: Mapping[str, Any], asked: set[str] | None = None) -> None:
        super().__init__(values)
        self.asked: set[str] = set() if asked is None else asked

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __or__(self, other: Any) -> Asked:  # type: ignore[override]
        return Asked({**self, **other}, self.asked)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A known architecture, and the foreign config as its reader wants it.

    Args:
      values: the config.
      read: its reader: a config of ours, or a CheckpointError.
      prefix: what the keys of the architecture begin with.
      where: what error messages call the config.
    """

    values: Mapping[str, Any]
    read: Callable[[Asked], Any]
    prefix: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a reader fared.

    Args:
      asked: keys that it knows.
      missing: keys that it needs, and there are not.
      refused: what it does not compute, as key=value.
      stopped: why it came to no end, or "".
      found: what it returned, where nothing is missing, refused or in its way.
    """

    asked: frozenset[str]
    missing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    stopped: str = ""
    found: Any = None


def compare(candidate: Candidate) -> Difference:
    """Let a reader loose; what is in its way is noted and taken out of it, as long as that helps.

    >>> def read(values):
    ...     if values.get("size") is None:
    ...         raise CheckpointError("config.json: 'size' is missing.", why="", fix="")
    ...     if values.get("bias"):
    ...         raise CheckpointError("config.json: bias=True is not computed here.", why="", fix="")
    >>> found = compare(Candidate({"bias": True, "own": 1}, read))
    >>> found.missing, found.refused, sorted(found.asked)
    (('size',), ('bias=True',), ['bias', 'size'])
    """
    values, missing, refused = Asked(candidate.values), list[str](), list[str]()
    while True:
        try:
            found = candidate.read(values)
        except CheckpointError as error:
            said = error.what.replace(candidate.where, "")
            named = [key for key in sorted(values.asked) if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", said)]
            if "is missing" in said and (absent := [key for key in named if dict.get(values, key) is None]):
                missing.append(absent[-1])
                values[absent[-1]] = 1  # which most keys could be
                continue
            if present := [key for key in named if dict.get(values, key) is not None and key not in missing]:
                refused.append(f"{present[-1]}={values.pop(present[-1])!r:.30}")
                continue
            stopped = "" if missing or refused else said.lstrip(": ")
        except Exception as error:  # a reader's checks are for the configs of its own family
            stopped = "" if missing or refused else f"{type(error).__name__}: {error}"
        else:
            stopped = ""
            if not missing and not refused:
                return Difference(frozenset(values.asked), found=found)
        return Difference(frozenset(values.asked), tuple(missing), tuple(refused), stopped)


def unknown_architecture(
    where: str,
    name: str,
    candidates: Mapping[str, Candidate],
    names: Callable[[Any], tuple[Iterable[str], Iterable[str]]],
    like: str | None = None,
) -> CheckpointError:
    """The error that names the nearest known architecture and what differs.

    Args:
      where: the file or folder.
      name: its architecture.
      candidates: the known ones by name.
      names: of what a reader found, the tensors that it wants, and those that there are.
      like: what its part that reads text says it is, where that is a part; else its name.
    """
    found = {known: compare(candidate) for known, candidate in candidates.items()}
    # What is turned off is not asked about further: so once more with all of it turned on.
    on = {known: {k: v is False or v for k, v in c.values.items()} for known, c in candidates.items()}
    asked_of = {
        known: found[known].asked | compare(dataclasses.replace(c, values=on[known])).asked
        for known, c in candidates.items()
    }

    def unknown(known: str) -> list[str]:
        c, d = candidates[known], found[known]
        # One that stopped early has not asked for all that it knows: then, what nobody asks for.
        asked = asked_of[known] if not d.stopped else frozenset[str]().union(*asked_of.values())
        own = (key for key, value in c.values.items() if key.startswith(c.prefix) and value is not None)
        return [key for key in own if key not in asked and key not in INERT]

    def lacks(known: str) -> list[str]:
        d, values = found[known], candidates[known].values
        return [*d.missing, *sorted(k for k in d.asked & SIZES if values.get(k) is None and k not in d.missing)]

    def cost(known: str) -> int:
        d = found[known]
        return len(unknown(known)) + len(lacks(known)) + len(d.refused) + 10 * bool(d.stopped)

    def tensors(known: str) -> tuple[list[str], list[str]] | None:
        """Names that only the file has, and that only the known one has; None where they cannot be compared."""
        d = found[known]
        if d.found is None:
            return None
        try:
            wanted, there = (dict.fromkeys(re.sub(r"\.\d+\.", ".N.", t) for t in side) for side in names(d.found))
        except (CheckpointError, OSError):  # no tensors, or damaged ones, which are not what is refused here
            return None
        return [t for t in there if t not in wanted], [t for t in wanted if t not in there]

    named = difflib.get_close_matches((like or name)[:60], candidates, n=3, cutoff=0.6)
    pool = sorted(named or candidates, key=cost)[:NEAREST]
    differs = {known: tensors(known) for known in pool}
    near = min(pool, key=lambda known: cost(known) + sum(map(len, differs[known] or ())))
    d, c, apart = found[near], candidates[near], differs[near]
    also, without = apart or ([], [])
    lists: dict[str, Iterable[str]] = {
        "its config also has": unknown(near),
        "its config asks for what is not computed there": d.refused,
        "its config lacks": lacks(near),
        "it also has the tensors": also,
        "it lacks the tensors": without,
    }
    silent = "nothing that its config or the names of its tensors show"
    if apart is None:
        silent = "nothing that its config shows, and its tensors cannot be read"
    told = [f"{what}: {_some(keys, c.prefix)}" for what, keys in lists.items() if keys]
    told += [f"{near}'s reader came to no end: {d.stopped[:100]}"] if d.stopped else []
    return CheckpointError(
        f"{where} is of an architecture that is not computed here: {name!r:.60}.",
        why=f"the nearest known one is {near!r}; what differs: {'; '.join(told) or silent}.",
        fix="use a model of a known one, or define the family with ip.define",
    )


def _some(names: Iterable[str], prefix: str) -> str:
    short = list(dict.fromkeys(name.removeprefix(prefix)[:60] for name in names))
    return ", ".join(short[:SHOWN]) + (f" and {len(short) - SHOWN} more" if len(short) > SHOWN else "")
