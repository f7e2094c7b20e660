"""`infopt bench generate`: how fast stacks decode, beside the same model written by hand."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import infopt
from infopt.errors import InfoptError
from infopt.generation import compiled
from infopt.io import load
from infopt.model import Model
from infopt.sampling import Sampling, sample
from infopt.timing import decoding, interleaved, prefilled, timed
from infopt.transforms import cache_kv, quantize, self_draft, speculative
from infopt.typing import Array, Params

PREFILL, PROMPT, NEW = 512, 128, 128
"""Tokens of the prefill that is timed; of the prompt before decoding; decoded: a context of 256 at the end."""
STEAM = "The history of the steam engine begins in the first century, when"


def yardstick(
    model: Model, params: Params, length: int, product: str = "x @ w.T"
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A Llama as one would write it by hand for one row: a scan over layers, a linear cache, greedy, no options.

    It reads the same float32 weights. `product`, `"x @ w.T"` or `"einsum"`, spells the same thing in two ways, of which
    XLA makes code of very different speed; which one is the faster depends on its release.

    Returns `prefill(params, tokens[T]) -> (cache, last logits)` and
    `decode(params, cache, token, position) -> tokens`, both jitted.
    """
    if model.spec.family != "llama" or model.recipe.steps or len(params["segments"]) != 1:
        raise InfoptError(
            "the yardstick is a bare llama.",
            why="the loop written by hand knows no other family and no transform.",
            fix="--model with a llama checkpoint",
        )
    c: Any = model.spec.config
    half = c.head_dim // 2
    frequency = jnp.asarray(c.rope_theta ** (-np.arange(half) / half), jnp.float32)

    def norm(x: Array, w: Array) -> Array:
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c.norm_eps) * w

    def times(x: Array, w: Array) -> Array:
        return x @ w.T if product == "x @ w.T" else jnp.einsum("ti,oi->to", x, w)

    def turn(x: Array, at: Array) -> Array:
        angle = at[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    def forward(params: Params, tokens: Array, cache: Any, start: Array) -> tuple[Array, Any]:
        stack = params["segments"][0][0]
        at = start + jnp.arange(tokens.shape[0])
        seen = jnp.arange(length)[None] <= at[:, None]

        def layer(carry: Any, i: Array) -> Any:
            x, keys, values = carry
            w = {n: lax.dynamic_index_in_dim(s, i, 0, keepdims=False) for n, s in stack.items()}
            h = norm(x, w["attn_norm"])
            q, k, v = (times(h, w[n]).reshape(len(tokens), -1, c.head_dim) for n in ("attn.q", "attn.k", "attn.v"))
            keys = lax.dynamic_update_slice(keys, turn(k, at)[None], (i, start, 0, 0))
            values = lax.dynamic_update_slice(values, v[None], (i, start, 0, 0))
            q = turn(q, at).reshape(len(tokens), c.kv_heads, -1, c.head_dim)
            s = jnp.einsum("tkgd,skd->kgts", q, keys[i]) * c.head_dim**-0.5
            p = jax.nn.softmax(jnp.where(seen, s, -1e30), -1)
            x = x + times(jnp.einsum("kgts,skd->tkgd", p, values[i]).reshape(len(tokens), -1), w["attn.o"])
            h = norm(x, w["mlp_norm"])
            x = x + times(jax.nn.silu(times(h, w["mlp.gate"])) * times(h, w["mlp.up"]), w["mlp.down"])
            return (x, keys, values), None

        (x, *cache), _ = lax.scan(layer, (params["embed"][tokens], *cache), jnp.arange(c.layers))
        return times(norm(x[-1:], params["final_norm"]), params.get("head", params["embed"]))[0], tuple(cache)

    def prefill(params: Params, tokens: Array) -> Any:
        shape = (c.layers, length, c.kv_heads, c.head_dim)
        logits, cache = forward(params, tokens, (jnp.zeros(shape), jnp.zeros(shape)), jnp.int32(0))
        return cache, logits

    def decode(params: Params, cache: Any, token: Array, position: Array) -> Array:
        def step(carry: Any, _: None) -> Any:
            token, position, cache = carry
            logits, cache = forward(params, token[None], cache, position)
            token = jnp.argmax(logits).astype(jnp.int32)
            return (token, position + 1, cache), token

        return lax.scan(step, (token, position, cache), None, length=NEW)[1]

    return jax.jit(prefill), jax.jit(decode)


def _first_token(model: str, cache: str) -> float:
    """Seconds from the start of `infopt generate` to its first token, as it says itself, in a new process."""
    env = {k: v for k, v in os.environ.items() if k != "INFOPT_COMPILE_CACHE"} | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    out = subprocess.run(
        [sys.executable, "-m", "infopt", "generate", model, STEAM, "--max-new", "2", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(out)["first_token_seconds"]


def generate(name: str = "smollm2-135m", repeats: int = 5) -> dict[str, Any]:
    """What `infopt bench generate` measures.

    Args:
      name: a llama checkpoint, by name or path.
      repeats: runs that a median is over.

    Returns:
      Seconds, rates (tokens a second) and ratios by name.
    """
    model, params = load(name)
    rng = np.random.default_rng(0)
    vocab = model.spec.config.vocab
    prompt, long = (rng.integers(0, vocab, n).astype(np.int32) for n in (PROMPT, PREFILL))
    length = PROMPT + NEW
    cached = cache_kv()(model)
    spellings = ("x @ w.T", "einsum")
    by_hand = {product: yardstick(model, params, length, product) for product in spellings}
    long_by_hand = {product: yardstick(model, params, PREFILL, product)[0] for product in spellings}
    # `generate` leaves an uncached model's prompt unread until the first token: here it is computed
    whole, empty = jax.jit(model.hidden), model.init_state(1, PREFILL)
    hand_cache, _ = by_hand[spellings[0]][0](params, jnp.asarray(prompt[:-1]))
    runs: dict[str, Callable[[], float]] = {
        "prefill cached": lambda: timed(lambda: prefilled(cached, params, long, PREFILL).lengths),
        "prefill uncached": lambda: timed(lambda: whole(params, jnp.asarray(long)[None], empty)[0]),
        "decode cached": decoding(cached, params, prompt, length, NEW),
        "decode uncached": decoding(model, params, rng.integers(0, vocab, length - 2).astype(np.int32), length, 2),
    }
    tokens = {
        "prefill cached": PREFILL,
        "prefill uncached": PREFILL,
        "decode cached": NEW,
        "decode uncached": 2,
    }
    for product in spellings:
        runs[f"prefill yardstick, {product}"] = lambda run=long_by_hand[product]: timed(
            lambda: run(params, jnp.asarray(long))[1]
        )
        runs[f"decode yardstick, {product}"] = lambda run=by_hand[product][1]: timed(
            lambda: run(params, hand_cache, jnp.asarray(prompt[-1]), jnp.int32(PROMPT - 1))
        )
        tokens |= {f"prefill yardstick, {product}": PREFILL, f"decode yardstick, {product}": NEW}
    stacks = {
        "int8": quantize(bits=8) | cache_kv(),
        "int4": quantize(bits=4) | cache_kv(),
        "int8, inputs too": quantize(bits=8, activations=8) | cache_kv(),
        "int4, inputs too": quantize(bits=4, activations=8) | cache_kv(),
        "int8 kv": cache_kv(bits=8),
        "speculative, int4 draft, k=4": cache_kv() | speculative(self_draft(quantize(bits=4)), k=4),
    }
    for label, stack in stacks.items():
        made = stack(model)
        own = made.convert(params)
        runs[f"decode {label}"] = decoding(made, own, prompt, length, 32)
        tokens[f"decode {label}"] = 32
        if any(form.activations for _, form in made.spec.weights):
            runs[f"prefill {label}"] = lambda made=made, own=own: timed(
                lambda: prefilled(made, own, long, PREFILL).lengths
            )
            tokens[f"prefill {label}"] = PREFILL

    logits = jax.random.normal(jax.random.key(0), (1, 1, vocab)) * 3
    text = jnp.zeros((1, length), jnp.int32)
    draw = jax.jit(sample)
    for label, options in {"greedy": {}, "top-k and top-p": dict(temperature=0.8, top_k=40, top_p=0.95)}.items():
        s = Sampling.of(1, **options)
        runs[f"sample {label}"] = lambda s=s: (
            timed(lambda: [draw(logits, s, text, jnp.full((1, 1), length, jnp.int32)) for _ in range(10)]) / 10
        )

    seconds = interleaved(runs, repeats)
    step = seconds["decode cached"] / NEW
    prefill, rounds = compiled(cached.spec)
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_first_token(name, folder) for _ in range(2))
    rate = {run: tokens[run] / s for run, s in seconds.items() if run in tokens}
    best = {part: max(rate[f"{part} yardstick, {product}"] for product in spellings) for part in ("prefill", "decode")}
    return {
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "versions": {"infopt": infopt.__version__, "jax": jax.__version__},
        "repeats": repeats,
        "tokens_per_second": rate,
        "ratios": {
            "cached decode / uncached, 256 tokens of context": rate["decode cached"] / rate["decode uncached"],
            "cached decode / faster yardstick": rate["decode cached"] / best["decode"],
            "prefill / faster yardstick": rate["prefill cached"] / best["prefill"],
            **{f"decode {label} / float32": rate[f"decode {label}"] / rate["decode cached"] for label in stacks},
            **{
                f"prefill {label} / float32": rate[f"prefill {label}"] / rate["prefill cached"]
                for label in stacks
                if f"prefill {label}" in rate
            },
        },
        "sampling_share_of_a_step": {
            label: seconds[f"sample {label}"] / step for label in ("greedy", "top-k and top-p")
        },
        "compile_seconds": {"prefill of 128": prefill.seconds / max(prefill.compilations, 1), "decode": rounds.seconds},
        "first_token_seconds": {"first start": cold, "second start, compiled programs kept": warm},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(args: argparse.Namespace) -> int:
    """`infopt bench generate`."""
    found = generate(args.model, args.repeats)
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{args.model} on {found['device']}, jax {found['versions']['jax']}; "
        f"medians of {found['repeats']} interleaved runs"
    )
    print(f"prefill of {PREFILL} tokens; decode of {NEW} after {PROMPT} (uncached: 2 at {PROMPT + NEW}; others: 32)\n")
    for title, unit in (
        ("tokens_per_second", "tokens/s"),
        ("ratios", "x"),
        ("sampling_share_of_a_step", "%"),
        ("compile_seconds", "s"),
        ("first_token_seconds", "s"),
    ):
        print(title.replace("_", " "))
        for name, value in found[title].items():
            print(f"  {name:<52}{value * (100 if unit == '%' else 1):>10.2f} {unit}")
    print(f"peak memory of this process{found['peak_memory_mb']:>37.0f} MB")
    return 0
