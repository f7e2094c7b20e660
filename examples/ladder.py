"""How far down a model can be rounded: bits, groups and methods, each measured beside the model it was.

    python examples/ladder.py                                                    # `tiny`, a small part
    python examples/ladder.py --all --out ladder-tiny --json docs/ladder_tiny.json
    python examples/ladder.py --model smollm2-135m --all --out ladder-smollm2 --json docs/ladder_smollm2.json
    python examples/ladder.py --page docs/ladder.md docs/ladder_tiny.json docs/ladder_smollm2.json

Grids are symmetric (int4, int3, int2: scale = extreme value / least level), blocks alone are rounded, and a group that
does not divide a row is filled up; what that takes is counted. A run that was stopped goes on where it was: rows lie in
the folder of --out, and what methods had computed in infopt's cache. A table may be taken in parts: where the file for
--json is there already, its other rows stay. Methods read the calibration split of CPython's topics, the table the
held-out one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import infopt as ip
from infopt.ablation.table import markdown
from infopt.model import is_matrix, shapes

METHODS = {
    "rounded": "",
    "awq": "awq()",
    "gptq": "gptq()",
    "autoround": "autoround()",
    "gptq, distilled": "distilled(start=gptq())",
}
ROTATED = ("rounded", "gptq", "gptq, distilled")
SIZES = {"plain": "", "rotated": ", rotated"}


def stacks(model: ip.Model, bits: list[int], groups: list[int], methods: list[str]) -> dict[str, str]:
    """The rows, by name."""
    widths = {s[-1] for n, s in shapes(model.spec).items() if n.startswith("layers.") and is_matrix(n, s)}
    found = {}
    for b in bits:
        for group in groups:
            pad = ", pad=True" if any(width % group for width in widths) else ""
            for rotated in ("", "rotate() | "):
                for name in methods if not rotated else [m for m in methods if m in ROTATED]:
                    how = f", method={METHODS[name]}" if METHODS[name] else ""
                    label = f"{b} bits, {group}, {name}" + ", rotated" * bool(rotated)
                    found[label] = f"{rotated}quantize(bits={b}, group={group}{pad}{how})"
    return found


def as_json(table: ip.Table, model: str) -> dict[str, Any]:
    """What is kept of a table: of each row the KL and the perplexity to the base, with their intervals, and the commit
    that measured it."""
    base, rows = table.rows[0].scores, []
    for row in table.rows[1:]:
        assert row.scores is not None and base is not None
        kl, ppl = row.scores.kl, ip.difference(row.scores, base, "ppl", relative=True)
        found = {name: [each.value, each.low, each.high] for name, each in (("kl", kl), ("ppl", ppl))}
        own = {"name": row.name, "stack": row.stack, "bytes_a_weight": row.weight_bytes / row.weights}
        rows.append(own | found | {"commit": row.about["commit"]})
    return {"model": model, "title": table.title, "rows": rows}


def merged(told: dict[str, Any], file: Path) -> dict[str, Any]:
    """With the rows that the file has of the same model, text and versions, in the ladder's order."""
    before = json.loads(file.read_text()) if file.exists() else told
    if before["title"] != told["title"]:
        raise SystemExit(f"{file} is of {before['title']}, this run of {told['title']}: give --json another file.")
    rows = {row["name"]: row for row in [*before["rows"], *told["rows"]]}
    return told | {"rows": sorted(rows.values(), key=lambda row: place(row["name"]))}


def place(name: str) -> tuple[int, int, bool, int]:
    """Where a row stands: bits down, groups up, and of each the methods, plain and rotated."""
    bits, group, method = name.split(", ", 2)
    plain = method.removesuffix(", rotated")
    return -int(bits.split()[0]), int(group), plain != method, [*METHODS].index(plain)


def page(files: list[Path]) -> str:
    """Markdown: for each model, bits and groups down, methods across."""
    parts = ["# The ladder\n", "Printed by `python examples/ladder.py --page`; how, says its docstring.\n"]
    for told in (json.loads(file.read_text()) for file in files):
        cells = {row["name"]: row for row in told["rows"]}
        names = sorted({name.split(", ", 2)[2] for name in cells}, key=lambda name: place(f"4 bits, 32, {name}"))
        grids = list(dict.fromkeys(", ".join(name.split(", ", 2)[:2]) for name in cells))
        parts += [f"## {told['model']}\n", told["title"] + "\n"]
        for what, of in (("KL to the base, nats a token", kl_cell), ("Perplexity to the base", ppl_cell)):
            own = [{n: of(cells[f"{grid}, {n}"]) if f"{grid}, {n}" in cells else "" for n in names} for grid in grids]
            lines = markdown([{"bits, group": grid} | row for grid, row in zip(grids, own, strict=True)])
            parts += [f"{what}:\n", *lines, ""]
        sizes = [{"bits, group": g} | {k: size(cells, f"{g}, rounded{r}") for k, r in SIZES.items()} for g in grids]
        parts += ["Bytes a weight, all weights, scales and filling counted:\n", *markdown(sizes), ""]
    return "\n".join(parts)


def size(cells: dict[str, Any], name: str) -> str:
    return f"{cells[name]['bytes_a_weight']:.3f}" if name in cells else ""


def kl_cell(row: dict[str, Any]) -> str:
    value, low, high = row["kl"]
    return f"{value:.4f} ± {(high - low) / 2:.4f}"


def ppl_cell(row: dict[str, Any]) -> str:
    value, low, high = (100 * x for x in row["ppl"])
    return f"{value:+.1f}% ± {(high - low) / 2:.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a path (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="4, 3 and 2 bits, groups of 32, 64 and 128, all methods")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 3, 2), help="only these")
    parser.add_argument("--groups", type=int, nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], help="only these")
    parser.add_argument("--tokens", type=int, help="of held-out text (default: as infopt ablate; a small part: 4096)")
    parser.add_argument("--out", type=Path, help="a folder for the rows, from which a run that was stopped goes on")
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--page", type=Path, help="only write what FILES, written by --json, say as Markdown")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILES", help="for --page")
    args = parser.parse_args()
    if args.page:
        args.page.write_text(page(args.files))
        return

    model, params = ip.load(args.model)
    bits = args.bits or ([4, 3, 2] if args.all else [4])
    groups = args.groups or ([32, 64, 128] if args.all else [64])
    methods = args.methods or ([*METHODS] if args.all else ["rounded", "gptq"])
    rows = stacks(model, bits, groups, methods)
    tokens = args.tokens or (None if args.all else 4096)
    table = ip.ablate(model, params, rows, metrics=("ppl", "kl"), tokens=tokens, out=args.out, name=args.model)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(merged(as_json(table, args.model), args.json), indent=1) + "\n")


if __name__ == "__main__":
    main()
