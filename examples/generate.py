"""Stack transforms over a model, write text through them, and compare with the bare model.

python examples/generate.py
python examples/generate.py --stack "gqa(1) | cache_kv()"
python examples/generate.py --stack "cache_kv() | speculative(draft=self_draft(quantize(bits=4, group=32)), k=4)"
"""

from __future__ import annotations

import argparse

import infopt as ip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face folder")
    parser.add_argument("--prompt", default="The history of the steam engine begins in the first century, when")
    parser.add_argument("--stack", default="quantize(bits=8) | cache_kv()")
    parser.add_argument("--max-new", type=int, default=24)
    args = parser.parse_args()

    # A model is data plus pure functions; a transform is a function from a model to a model.
    model, params = ip.load(args.model)
    stack = ip.parse_stack(args.stack)(model)
    print(stack)

    # The stack's params come from the model's own: packed, pooled, paired with a draft's, whatever it asks for.
    stack_params = stack.convert(params)
    out = ip.generate(stack, stack_params, args.prompt, max_new=args.max_new)
    print(f"{args.prompt}{out.text}\n  {out.tokens_per_second:.1f} tokens a second")
    if out.acceptance is not None:
        print(f"  acceptance {out.acceptance:.2f}, {out.tokens_per_round:.2f} tokens a round")

    # The bare model recomputes everything for each token: slow, and the yardstick for what the stack changed.
    bare = ip.generate(model, params, args.prompt, max_new=args.max_new)
    same = next((i for i, (a, b) in enumerate(zip(out.tokens, bare.tokens)) if a != b), len(bare.tokens))
    print(f"bare model: {bare.text}\n  {bare.tokens_per_second:.1f} tokens a second")
    print(f"the first {same} of {len(bare.tokens)} tokens agree; exact: {stack.exact}")


if __name__ == "__main__":
    main()
