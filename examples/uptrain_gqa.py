"""Fewer key/value heads for `tiny`: what they cost at once, and what a short uptraining wins back.

    python examples/uptrain_gqa.py                                # 8 to 2 heads by their mean, 25 steps
    python examples/uptrain_gqa.py --all --out docs/uptrain.json  # 2 and 1; mean, first, random; 5% of its steps

Uptrained on the text that `tiny` was trained on, measured on the held-out topics. The loss is nats a token, the log of
perplexity; a row's cost is its loss less that of `tiny`, and what is recovered is the share of the cost at once that
is gone afterwards. The rate and the rest were chosen on the calibration split.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np

import infopt as ip
from infopt import texts

ORIGINAL = 1400
"""Steps that `tiny` was trained for (examples/train_tiny.py), of 4,096 tokens each."""
PLAN: dict[str, Any] = dict(mix=1.0, rate=4e-3, batch=16, length=256, accumulate=4)
ROWS = [(heads, init) for init in ("mean", "first", "random") for heads in (2, 1)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A stack on the held-out text: nats a token, how much above the teacher's, and KL from it with a 95% interval."""

    loss: float
    perplexity: float
    cost: float
    kl: float
    kl_low: float
    kl_high: float


def measure(model: ip.Model, params: Any, teacher: tuple[ip.Model, Any], windows: ip.Windows, base: float) -> Point:
    scores = ip.measure(model, params, windows, teacher)
    ppl, kl = scores.ppl.value, scores.kl
    values = (math.log(ppl), ppl, math.log(ppl) - base, kl.value, kl.low, kl.high)
    return Point(*(round(value, 4) for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all rows, 70 steps, the whole held-out text")
    parser.add_argument("--steps", type=int, help="updates a row (default: 25; with --all 70, 5%% of the original's)")
    parser.add_argument("--tokens", type=int, help="of held-out text (default: 4096; with --all all of it)")
    parser.add_argument("--out", type=Path, help="a JSON file for the table and the loss curves")
    parser.add_argument("--checkpoints", type=Path, help="a folder from which a run that was stopped goes on")
    args = parser.parse_args()
    steps = args.steps or (ORIGINAL // 20 if args.all else 25)

    model, params = teacher = ip.load("tiny")
    windows = ip.windows(texts.topics(), 512, tokenizer=model.tokenizer)
    if args.tokens or not args.all:
        windows = windows.spread(args.tokens or 4096)
    documents = texts.documents("training") * 2 + texts.docstrings()
    text = np.concatenate([model.tokenizer.encode(each) for each in documents])
    ppl = ip.measure(model, params, windows).ppl.value
    base = math.log(ppl)
    had = model.spec.config.kv_heads
    print(f"tiny, {had} key/value heads: {base:.4f} nats a token, perplexity {ppl:.2f}, on {windows.scored:,} tokens")
    print(f"uptraining: {steps} steps, {steps / ORIGINAL:.1%} of the original's\n")
    print(
        f"{'stack':<44} {'cost at once':>12} {'afterwards':>10} {'recovered':>9}   KL at once, afterwards", flush=True
    )
    about: dict[str, Any] = {
        "model": "tiny",
        "heldout_text": texts.digest(texts.topics()),
        "heldout_tokens": windows.scored,
        "training_text": texts.digest("\n\n".join(texts.documents("training") + texts.docstrings())),
        "base": {"loss": round(base, 4), "perplexity": round(ppl, 4)},
        "steps": steps,
        "of_the_originals_steps": round(steps / ORIGINAL, 4),
        "of_the_originals_tokens": round(steps * PLAN["batch"] * PLAN["length"] / (ORIGINAL * 4096), 4),
        "plan": PLAN,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "optax")},
        "rows": [],
    }
    for heads, init in ROWS if args.all else ROWS[:1]:
        transform = ip.gqa(heads, init)
        small = transform(model)
        start = small.convert(params)
        folder = args.checkpoints / f"{heads}-{init}" if args.checkpoints else None
        done, losses = ip.uptrain(
            small, start, teacher=teacher, text=text, steps=steps, folder=folder, every=10, **PLAN
        )
        before, after = (measure(small, p, teacher, windows, base) for p in (start, done))
        recovered = round(1 - after.cost / before.cost, 4)
        print(f"{transform!r:<44} {before.cost:>12.4f} {after.cost:>10.4f} {recovered:>9.1%}", end="   ")
        print(f"{before.kl:.4f}, {after.kl:.4f}", flush=True)
        points = {"at_once": dataclasses.asdict(before), "afterwards": dataclasses.asdict(after)}
        curve = [round(float(loss), 4) for loss in losses]
        about["rows"].append({"stack": repr(transform), **points, "recovered": recovered, "curve": curve})
        if args.out:
            args.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
