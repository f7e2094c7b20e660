r"""Bits given to the matrices that need them: `ip.mixed` against one format of the same bytes, and random choices.

    python examples/budget.py                                                       # `tiny`, a small part
    python examples/budget.py --all --json docs/budget_tiny.json
    python examples/budget.py --model smollm2-135m --rotate --all --tokens 512 --length 256 --held 5120 \
        --json docs/budget_smollm2.json

Each matrix's sensitivity is measured on calibration text, and what is chosen by it on held-out text: KL to the model as
it was, rounded to nearest, 95% intervals of paired differences. The budget is what the one format measures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import infopt as ip

UNIFORM: dict[str, dict[str, Any]] = {"4.25 bits": dict(bits=4, group=64), "5 bits": dict(bits=4, group=16)}
CHOICES = (3, 4, 5, 8)


def line(name: str, kl: ip.Estimate, bits: float, more: str = "") -> str:
    return f"  {name:<22}{bits:>7.4f} bits   KL {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}){more}"


def compared(
    model: ip.Model,
    params: Any,
    budget: str,
    sensitivity: ip.Sensitivity,
    read: ip.Windows,
    held: ip.Windows,
    segments: int,
    draws: int,
) -> dict[str, Any]:
    """One budget: the scores of all choices, and the differences of the first to the others."""
    weights = sum(sensitivity.weights)
    one = ip.quantize(**UNIFORM[budget])
    formats, known = one.formats(model.spec), ip.model.shapes(model.spec)
    bits = 8 * sum(form.bytes(known[name]) for name, form in formats.items()) / weights
    found = ip.mixed(model, params, bits, sensitivity=sensitivity, segments=segments, text=read, progress=False)
    stack = (one | ip.dequantize())(model)
    uniform = ip.measure(stack, stack.convert(params, model), held, (model, params))
    scores = {"mixed": found.measure(model, params, held), "uniform": uniform}
    less = ip.difference(scores["mixed"], uniform, "kl")
    print(f"\n{budget}: {one!r}; mixed: segments {found.segments}, predicted {found.predicted:.4f}, so on that text")
    print(f"{found.actual:.4f} ({found.error:+.0%})")
    print(line("mixed", scores["mixed"].kl, found.bits))
    print(line("uniform", uniform.kl, bits, f", mixed less by {less}"))
    drawn = [f"random {seed}" for seed in range(draws)]
    for seed, name in enumerate(drawn):
        other = found.random(seed)
        scores[name] = other.measure(model, params, held)
        print(line(name, scores[name].kl, other.bits), flush=True)
    best = min(drawn, key=lambda name: scores[name].kl.value)
    less_than_best = ip.difference(scores["mixed"], scores[best], "kl")
    print(f"  mixed against the best of them, {best}: {less_than_best}")
    return {
        "uniform": repr(one),
        "bits": bits,
        "where": found.where,
        "predicted": found.predicted,
        "actual": found.actual,
        "kl": {name: vars(each.kl) for name, each in scores.items()},
        "less than uniform by": vars(less),
        "less than the best random by": vars(less_than_best),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a path (default: %(default)s)")
    parser.add_argument("--rotate", action="store_true", help="rotate its stream first")
    parser.add_argument("--all", action="store_true", help="both budgets, ten random choices, more text")
    parser.add_argument("--segments", type=int, default=8, help="runs of layers, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of calibration text (default: 2048; a small part: 1024)")
    parser.add_argument("--held", type=int, help="tokens of held-out text (default: 10240; a small part: 2048)")
    parser.add_argument("--length", type=int, help="of windows (default: the context, at most 512)")
    parser.add_argument("--json", type=Path, help="a file for all of it")
    args = parser.parse_args()

    model, params = ip.load(args.model)
    if args.rotate:
        made = ip.rotate()(model)
        model, params = made, made.convert(params, model)
    length = args.length or min(512, model.spec.config.context)
    read, held = (
        ip.windows(ip.texts.topics(split), length, tokenizer=model.tokenizer) for split in ("calibration", "heldout")
    )
    read = read.spread(args.tokens or (2048 if args.all else 1024))
    held = held.spread(args.held or (10_240 if args.all else 2048))
    start = time.perf_counter()
    sensitivity = ip.sensitivity(model, params, formats=CHOICES, group=64, text=read)
    print(f"{args.model}{', rotated' * args.rotate}: {len(sensitivity.names)} matrices in {len(CHOICES)} formats, on")
    print(f"{sensitivity.tokens:,} tokens in {time.perf_counter() - start:.0f} s; KL on {held.scored:,} held out")
    budgets = list(UNIFORM) if args.all else list(UNIFORM)[:1]
    draws = 10 if args.all else 1
    found = {b: compared(model, params, b, sensitivity, read, held, args.segments, draws) for b in budgets}
    if args.json:
        about = {"model": args.model, "rotated": args.rotate, "calibration tokens": sensitivity.tokens,
                 "held-out tokens": held.scored, "held-out digest": held.digest}  # fmt: skip
        args.json.write_text(json.dumps({"about": about, "budgets": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
