"""How far down a model can be rounded: bits, groups and methods, each measured beside the model it was.

    python examples/ladder.py                                                    # `tiny`, a small part
    python examples/ladder.py --all --out ladder-tiny --json docs/ladder_tiny.json
    python examples/ladder.py --model smollm2-135m --all --out ladder-smollm2 --json docs/ladder_smollm2.json

Grids are symmetric (int4, int3, int2: scale = extreme value / least level), blocks alone are rounded, and a group that
does not divide a row is filled up; what that takes is counted. A run that was stopped goes on where it was: rows lie in
the folder of --out, and what methods had computed in infopt's cache. Methods read the calibration split of CPython's
topics, the table the held-out one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import infopt as ip
from infopt.model import is_matrix, shapes

METHODS = {
    "rounded": "",
    "awq": "awq()",
    "gptq": "gptq()",
    "autoround": "autoround()",
    "gptq, distilled": "distilled(start=gptq())",
}
ROTATED = ("rounded", "gptq", "gptq, distilled")


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
    args = parser.parse_args()

    model, params = ip.load(args.model)
    bits = args.bits or ([4, 3, 2] if args.all else [4])
    groups = args.groups or ([32, 64, 128] if args.all else [64])
    methods = args.methods or ([*METHODS] if args.all else ["rounded", "gptq"])
    rows = stacks(model, bits, groups, methods)
    tokens = args.tokens or (None if args.all else 4096)
    table = ip.ablate(model, params, rows, metrics=("ppl", "kl"), tokens=tokens, out=args.out, name=args.model)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(json.loads(table.to_json()), indent=1) + "\n")


if __name__ == "__main__":
    main()
