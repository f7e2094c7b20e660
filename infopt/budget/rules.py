"""A choice of formats, matrix by matrix, as a few patterns for `quantize(where=...)`."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping

from infopt.model import is_matrix, shapes
from infopt.spec import Spec

Rules = list[tuple[str, str]]
"""(pattern, format), of which the first that matches a name holds."""


def rules_of(spec: Spec, chosen: Mapping[str, str]) -> dict[str, str]:
    """Patterns, in order, that give these matrices these formats, and no other matrix any.

    A kind of matrix has its most frequent format by a pattern for all layers, after patterns for those that differ; the
    format of most matrices comes last.

    >>> import infopt as ip
    >>> spec = ip.models.llama(layers=12).spec
    >>> names = [n for n, _ in ip.quantize(bits=8)(ip.models.llama(layers=12)).spec.weights]
    >>> few = {f"layers.{i}.mlp.down": "int8" for i in (0, 1, 11)}
    >>> rules_of(spec, dict.fromkeys(names, "int4") | few)
    {'layers.[01].mlp.down': 'int8', 'layers.11.mlp.down': 'int8', 'layers.*': 'int4'}
    """
    matrices = [n for n, shape in shapes(spec).items() if is_matrix(n, shape)]
    first: Rules = [(n, form) for n, form in chosen.items() if not n.startswith("layers.")]
    usual: Rules = []
    kinds: dict[str, dict[int, str]] = {}
    for name, form in chosen.items():
        if name.startswith("layers."):
            _, layer, kind = name.split(".", 2)
            kinds.setdefault(kind, {})[int(layer)] = form
    for kind, of in kinds.items():
        most = Counter(sorted(of.values())).most_common(1)[0][0]
        if all(n in chosen for n in _matched(f"layers.*.{kind}", matrices)):
            usual.append((f"layers.*.{kind}", most))
        else:
            most = None
        for form in sorted({*of.values()} - {most}):
            first += [(f"layers.{at}.{kind}", form) for at in _numbers(i for i, f in of.items() if f == form)]
    rules = _taking(_wider(first, set(), chosen, matrices), matrices)
    for form in sorted({f for _, f in usual}, key=lambda f: (sum(of == f for of in chosen.values()), f)):
        taken = {n for pattern, _ in rules for n in _matched(pattern, matrices)}
        rules += _wider([rule for rule in usual if rule[1] == form], taken, chosen, matrices)
    return dict(_taking(rules, matrices))


def _matched(pattern: str, names: Iterable[str]) -> list[str]:
    return [n for n in names if fnmatch.fnmatchcase(n, pattern)]


def _numbers(layers: Iterable[int]) -> list[str]:
    """Patterns for these numbers alone.

    >>> _numbers([2, 3, 4, 7, 10, 25, 29])
    ['[2-47]', '10', '2[59]']
    """
    tens: dict[int, list[int]] = {}
    for layer in sorted(layers):
        tens.setdefault(layer // 10, []).append(layer % 10)
    return [f"{ten or ''}{_digits(ones)}" for ten, ones in tens.items()]


def _digits(ones: list[int]) -> str:
    """
    >>> _digits([3]), _digits([0, 1, 2, 9])
    ('3', '[0-29]')
    """
    if len(ones) == 1:
        return str(ones[0])
    runs: list[list[int]] = []
    for one in ones:
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return f"[{''.join(f'{r[0]}-{r[-1]}' if len(r) > 2 else ''.join(map(str, r)) for r in runs)}]"


def _wider(rules: Rules, taken: set[str], chosen: Mapping[str, str], matrices: list[str]) -> Rules:
    """Rules for the same layers and format joined to one, where that reaches nothing else but what is taken before."""
    parts = [pattern.split(".", 2) for pattern, _ in rules]
    wide = [
        f"layers.{part[1]}.{rest}" for part in parts if len(part) > 2 for rest in ("*", f"{part[2].split('.')[0]}.*")
    ]
    for pattern in sorted(dict.fromkeys(wide), key=len):
        pattern = pattern.replace("layers.*.*", "layers.*")
        names = [n for n in _matched(pattern, matrices) if n not in taken]
        forms = {chosen.get(n) for n in names}
        inside = [rule for rule in rules if {n for n in _matched(rule[0], matrices) if n not in taken} <= {*names}]
        form = next(iter(forms), None)
        if len(forms) == 1 and form is not None and len(inside) > 1:
            rules = [rule for rule in rules if rule not in inside] + [(pattern, form)]
    return rules


def _taking(rules: Rules, matrices: list[str]) -> Rules:
    """The rules that a matrix is left for."""
    found, left = Rules(), matrices
    for pattern, form in rules:
        if names := _matched(pattern, left):
            found.append((pattern, form))
            left = [n for n in left if n not in names]
    return found
