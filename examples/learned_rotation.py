r"""Does a learned rotation pay? A trial of SpinQuant's idea: the rotation trained until rounding loses less.

    python examples/learned_rotation.py                      # `tiny`, a few steps
    python examples/learned_rotation.py --all                # as the README's figures were taken; some 20 minutes
    python examples/learned_rotation.py --all --bits 3

What `ip.rotate(seed)` folds in is a fixed orthogonal matrix Q. Here Q O takes its place, O orthogonal by Cayley's
transform of a skew matrix that Adam trains on the KL of the rounded stack to the base, rounding's slope taken to be 1;
the rate is the best on calibration windows that were held back. Both are then rounded, to nearest and by GPTQ, and
measured on held-out text beside other seeds' Q: what is learned must be worth more than a lucky seed.

Source: Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations".
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import infopt as ip
from infopt.model import Weights, assemble, shapes, stream_of
from infopt.qtensor import dequantize_array, quantize_array
from infopt.transforms.quantize import Quantize

BATCH = 8


class Learned:
    """A model rotated by `ip.rotate(0)`, and what a further rotation makes of its params."""

    def __init__(self, base: ip.Model, params: Any, how: Quantize) -> None:
        self.base, self.base_params = base, params
        self.model = ip.rotate(0)(base)
        self.params = self.model.convert(params)
        self.spec, self.formats = self.model.spec, how.formats(self.model.spec)
        weights = Weights.of(self.spec, self.params)
        self.weights = {n: jnp.asarray(weights[n]) for n in shapes(self.spec)}

    def turned(self, skew: jax.Array) -> dict[str, jax.Array]:
        """All weights by logical name, with O = (1 + A)^-1 (1 - A) after Q, where A = skew - skew^T."""
        stream, w = stream_of(self.spec), dict(self.weights)
        one, a = jnp.eye(len(skew)), skew - skew.T
        o = jnp.linalg.solve(one + a, one - a)
        for name in (*stream.tables, *(n for names in stream.reads.values() for n in names)):
            w[name] = w[name] @ o
        for name in stream.writes:
            w[name] = o.T @ w[name]
        return w

    def assembled(self, weights: dict[str, jax.Array]) -> Any:
        made = Weights.of(self.spec, self.params).made(list(weights), weights.__getitem__)
        return assemble(self.spec, made)

    def loss(self, skew: jax.Array, tokens: jax.Array) -> jax.Array:
        """Mean KL of the base to the turned and rounded stack; to its slope, rounding does nothing."""
        w = self.turned(skew)
        for name, form in self.formats.items():
            rounded = dequantize_array(quantize_array(jax.lax.stop_gradient(w[name]), form, 2))
            w[name] = w[name] + jax.lax.stop_gradient(rounded - w[name])
        was = jax.nn.log_softmax(self.base.apply(self.base_params, tokens)[0])
        now = jax.nn.log_softmax(self.model.apply(self.assembled(w), tokens)[0])
        return jnp.mean(jnp.sum(jnp.exp(was) * (was - now), -1))

    def train(self, rows: np.ndarray, rates: list[float], steps: int) -> Any:
        """Params turned by the best of what the rates lead to, judged by windows held back."""
        train, back = rows[:-BATCH], rows[-BATCH:]
        slopes, loss = jax.jit(jax.value_and_grad(self.loss)), jax.jit(self.loss)
        zero = jnp.zeros((self.spec.config.dim,) * 2)
        begin = best = (float(loss(zero, back)), zero)
        for rate in rates:
            start, skew, found = time.perf_counter(), zero, begin
            adam = optax.adam(optax.cosine_decay_schedule(rate, steps))
            moments, rng = adam.init(skew), np.random.default_rng(0)
            for step in range(1, steps + 1):
                _, slope = slopes(skew, train[rng.choice(len(train), BATCH, replace=False)])
                updates, moments = adam.update(slope, moments)
                skew = jnp.asarray(optax.apply_updates(skew, updates))
                if step % max(steps // 5, 1) == 0:
                    found = min(found, (float(loss(skew, back)), skew), key=lambda each: each[0])
            seconds = time.perf_counter() - start
            print(f"rate {rate}: KL held back {begin[0]:.4f}, then {found[0]:.4f}, {seconds:.0f} s", flush=True)
            best = min(best, found, key=lambda each: each[0])
        return self.assembled(self.turned(best[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 3, 2), help="in groups of 32 (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="100 steps at three rates, four seeds, GPTQ, more text")
    args = parser.parse_args()

    model, params = ip.load("tiny")
    held = ip.windows(ip.texts.topics(), 512, tokenizer=model.tokenizer).spread(8192 if args.all else 1024)
    read = ip.windows(ip.texts.topics("calibration"), 256, tokenizer=model.tokenizer).spread(16_384)
    rows = np.stack([row for row in read.rows if len(row) == 256])
    how = ip.quantize(bits=args.bits, group=32)
    methods = {"to nearest": None, "gptq": ip.gptq()} if args.all else {"to nearest": None}

    def say(name: str, before: ip.Model, own: Any) -> None:
        cells = []
        for label, method in methods.items():
            stack = ip.quantize(bits=args.bits, group=32, method=method)(before)
            kl = ip.measure(stack, stack.convert(own, before), held, (model, params)).kl
            cells.append(f"{label} {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]")
        print(f"{name:<24}KL {', '.join(cells)}", flush=True)

    say("not rotated", model, params)
    for seed in range(4 if args.all else 1):
        rotated = ip.rotate(seed)(model)
        say(f"rotate({seed})", rotated, rotated.convert(params))
    learned = Learned(model, params, how)
    own = learned.train(rows, [3e-4, 1e-3, 3e-3] if args.all else [3e-3], 100 if args.all else 4)
    say("learned from rotate(0)", learned.model, own)


if __name__ == "__main__":
    main()
