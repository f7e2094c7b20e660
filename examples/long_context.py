"""Read 20,000 tokens in a cache of constant size: a window of 256, with attention sinks and without.

    python examples/long_context.py                               # the embedded model, trained on 512 positions
    python examples/long_context.py --model smollm2-135m          # some minutes

The same last sixth is read a third time in fresh pieces: 256 tokens as a prompt, then the next 64 scored, so that no
position lies beyond what the model was trained on. What the stream loses against that is what streaming costs
(Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks").
"""

from __future__ import annotations

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

import infopt as ip

CHUNK = 128
"""Tokens that one call appends."""
PARTS = 6


def scorer(model):
    """A step: append tokens `[B, T]`, and the nats of each under what came before it, `targets` being the next ones."""

    def step(params, tokens, targets, state, count):
        hidden, state = model.hidden(params, tokens, state, count)
        logits = model.head(params, hidden)
        nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return nats, state

    return jax.jit(step, donate_argnums=3)


def stream(model, params, tokens):
    """Nats of each token after the first, read in one stream; and the bytes of keys and values, which stay the same."""
    step, state = scorer(model), model.init_state(1, len(tokens), chunk=CHUNK)
    held = {sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv))}
    nats = []
    for start in range(0, len(tokens) - 1, CHUNK):
        piece = np.zeros((2, CHUNK), np.int32)
        count = min(CHUNK, len(tokens) - 1 - start)
        piece[0, :count], piece[1, :count] = (tokens[start + i : start + i + count] for i in (0, 1))
        found, state = step(params, jnp.asarray(piece[:1]), jnp.asarray(piece[1:]), state, jnp.asarray([count]))
        nats.append(np.asarray(found)[0, :count])
        held.add(sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)))
    (size,) = held
    return np.concatenate(nats), size


def fresh(model, params, tokens, first, prompt, piece=64):
    """Nats of the tokens from `first` on, each piece of them after a prompt of its own."""
    step, nats = scorer(model), []
    length = prompt + piece - 1
    for start in range(first, len(tokens), piece):
        rows = tokens[start - prompt : start + piece]
        text = np.zeros(length + 1, np.int32)
        text[: len(rows)] = rows
        state = model.init_state(1, length, chunk=length)
        found, _ = step(params, jnp.asarray(text[None, :-1]), jnp.asarray(text[None, 1:]), state, jnp.asarray([length]))
        nats.append(np.asarray(found)[0, prompt - 1 : len(rows) - 1])
    return np.concatenate(nats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name, a .gguf file or a folder (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20_000, help="to read (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="positions seen (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="first positions kept (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args()

    # Nothing of this was trained on by the embedded model; its last sixth is held out from everything.
    model, params = ip.load(args.model)
    text = ip.texts.topics("calibration") + "\n\n" + ip.texts.topics("heldout")
    tokens = np.asarray(model.tokenizer.encode(text)[-args.tokens :], np.int32)
    stacks = {
        f"window {args.window}, {args.sinks} sinks": ip.sliding_window(args.window, sinks=args.sinks),
        f"window {args.window}, no sinks": ip.sliding_window(args.window),
    }
    last = len(tokens) - len(tokens) // PARTS
    if last < args.window:
        parser.error(f"--tokens {args.tokens}: the last sixth must begin after a window of {args.window} tokens")
    found = {"model": args.model, "tokens": len(tokens), "window": args.window, "rows": []}
    for name, window in stacks.items():
        stack = (window | ip.cache_kv())(model)
        nats, size = stream(stack, stack.convert(params), tokens)
        parts = [math.exp(part.mean()) for part in np.array_split(nats, PARTS)]
        found["rows"].append({"stack": name, "ppl": parts, "last": math.exp(nats[last - 1 :].mean()), "kv_bytes": size})
    again = math.exp(fresh(ip.cache_kv()(model), params, tokens, last, args.window).mean())
    found["fresh"] = again

    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.model}: {len(tokens)} tokens, perplexity in each sixth of them")
    for row in found["rows"]:
        sixths = "  ".join(f"{ppl:8.2f}" for ppl in row["ppl"])
        off = row["last"] / again - 1
        print(f"  {row['stack']:<24}{sixths}   last: {off:+.1%} of fresh   keys and values {row['kv_bytes']:,} bytes")
    print(f"  the last sixth after fresh prompts of {args.window} tokens: {again:.2f}")


if __name__ == "__main__":
    main()
