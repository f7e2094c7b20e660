"""The script a paper would ship: FP32, FP16, INT8 and INT4 beside each other, with intervals, resumable.

    python examples/ablation.py                                   # the embedded model, a minute
    python examples/ablation.py --model smollm2-135m --out report/

Change one argument, run it again: what is measured already is not measured twice.
"""

from __future__ import annotations

import argparse

import infopt as ip

STACKS = {
    "fp16": ip.quantize(format="fp16"),
    "int8": ip.quantize(bits=8),
    "int4": ip.quantize(bits=4, group=32),
    "int4, head and embedding 8 bits": ip.quantize(where={"embed": 8, "layers.*": 4}, group=32),
    "int4, 8-bit kv": ip.quantize(bits=4, group=32) | ip.cache_kv(bits=8),
    "int8, window of 128": ip.quantize(bits=8) | ip.sliding_window(128, sinks=4) | ip.cache_kv(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name, a .gguf file or a folder (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text (default: %(default)s)")
    parser.add_argument("--out", help="a folder for rows, table and picture")
    args = parser.parse_args()

    model, params = ip.load(args.model)
    options = {"tokens": args.tokens, "name": args.model, "out": args.out}
    table = ip.ablate(model, params, STACKS, metrics=["ppl", "kl", "top1", "decode"], **options)
    print(table)

    # Any two rows are compared window by window, so that the text's own spread cancels out.
    cost = table.difference("int4, 8-bit kv", "int4", "kl")
    print(f"\nWhat 8-bit keys and values cost on top of int4: {cost} nats of KL a token")
    if args.out:
        table.save(args.out)


if __name__ == "__main__":
    main()
