r"""One budget of bytes for weights and cache: which formats, and what is done to keys and values, lose least.

    python examples/memory.py                                                       # `tiny`, a small part
    python examples/memory.py --all
    python examples/memory.py --model smollm2-135m --memory 225e6 --context 4096 --tokens 512 --length 256 --held 5120

Each way is measured alone and weights have what it leaves, by calibration text; then all that fit are measured on
held-out text, the one that was chosen and those that were not: KL to the model as it was, with 95% intervals.
"""

from __future__ import annotations

import argparse

import infopt as ip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a path (default: %(default)s)")
    parser.add_argument("--memory", type=float, help="bytes (default: the dense model's sixth, and half its cache)")
    parser.add_argument("--context", type=int, help="tokens (default: the model's)")
    parser.add_argument(
        "--beside", nargs="+", help="stacks with a cache (default: rounded caches, fewer heads, a window)"
    )
    parser.add_argument("--all", action="store_true", help="more text")
    parser.add_argument("--tokens", type=int, help="of calibration text (default: 2048; a small part: 1024)")
    parser.add_argument("--held", type=int, help="tokens of held-out text (default: 10240; a small part: 2048)")
    parser.add_argument("--length", type=int, help="of windows (default: the context, at most 512)")
    args = parser.parse_args()

    model, params = ip.load(args.model)
    context = args.context or model.spec.config.context
    cached = ip.cache_kv()(model)
    memory = args.memory or cached.weight_bytes() / 6 + context * cached.token_bytes() / 2
    half, window = max(1, model.spec.config.kv_heads // 2), max(8, context // 8)
    beside = args.beside or [
        *("cache_kv()", "cache_kv(bits=8)", "cache_kv(bits=4, split=32)", "cache_kv(bits=4)"),
        *(f"gqa(kv_heads={half}) | cache_kv()", f"sliding_window({window}, sinks=4) | cache_kv(bits=8)"),
    ]
    length = args.length or min(512, model.spec.config.context)
    read, held = (
        ip.windows(ip.texts.topics(split), length, tokenizer=model.tokenizer) for split in ("calibration", "heldout")
    )
    read = read.spread(args.tokens or (2048 if args.all else 1024))
    held = held.spread(args.held or (10_240 if args.all else 2048))
    found = ip.fit_memory(model, params, memory, context, beside, group=64, text=read)
    print(found)
    print(f"\nKL on {held.scored:,} held-out tokens:")
    for way in found.ways:
        if way.weights is None:
            continue
        kl = way.measure(model, params, held).kl
        chosen = ", chosen" if way is found.best else ""
        print(f"  {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f})  {way.beside!r}{chosen}", flush=True)


if __name__ == "__main__":
    main()
