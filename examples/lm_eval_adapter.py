"""Any stack under lm-evaluation-harness (`pip install lm_eval`); without it, what the harness would ask, by hand.

python examples/lm_eval_adapter.py
python examples/lm_eval_adapter.py --tasks hellaswag --limit 100 --stack "quantize(bits=8) | cache_kv()"
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import infopt as ip
from infopt.model import context_limit


class Adapter:
    """The three questions of the harness's `LM`, answered by a stack. A request's `args` are what is asked."""

    def __init__(self, model: ip.Model, params: Any, max_new: int = 256) -> None:
        super().__init__()
        self.model, self.params, self.max_new = model, params, max_new
        self.limit = context_limit(model.spec) or model.spec.config.context

    def _start(self, text: str) -> list[int]:
        """Token ids of a text, behind one that every text may follow: BOS, or what ends a text."""
        tokenizer = self.model.tokenizer
        ids, bare = tokenizer.encode(text), tokenizer.encode(text, special=False)
        return ids if len(ids) > len(bare) else [tokenizer.eos_ids[0], *bare]

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()  # blanks at its end count to the continuation
            encode = self.model.tokenizer.encode if bare else self._start
            head = encode(bare)
            tail = encode(context + continuation)[len(head) :]
            contexts.append(head[-(self.limit - len(tail)) :])  # its end, where all of it is too long
            continuations.append(tail)
        found = ip.loglikelihood(self.model, self.params, contexts, continuations)
        return [(logprob, greedy) for logprob, greedy in found]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        out = []
        for (text,) in (request.args for request in requests):
            cut = ip.windows([self._start(text)], self.limit)
            out.append(-sum(ip.measure(self.model, self.params, cut).nll))
        return out

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        out = []
        for context, options in (request.args for request in requests):
            new = int(options.get("max_gen_toks", self.max_new))
            ids = self.model.tokenizer.encode(context) if context else self._start("")
            temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
            said = ip.generate(
                self.model,
                self.params,
                ids[-(self.limit - new) :],
                max_new=new,
                stop=options.get("until") or (),
                temperature=temperature,
            )
            out.append(said.text)
        return out


def harness_model(model: ip.Model, params: Any) -> Any:
    """The adapter as one of the harness's own models, which `lm_eval.simple_evaluate(model=...)` takes."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    return type("InfoptLM", (Adapter, LM), {})(model, params)


class Request:
    """What the harness hands over."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face folder")
    parser.add_argument("--stack", default="quantize(bits=8) | cache_kv()")
    parser.add_argument("--tasks", help="tasks of lm-evaluation-harness, by commas; it must be installed")
    parser.add_argument("--limit", type=int, help="questions a task")
    args = parser.parse_args()

    model, params = ip.load(args.model)
    stack = ip.parse_stack(args.stack)(model)
    stack_params = stack.convert(params)
    print(stack)
    if args.tasks:
        import lm_eval  # pyright: ignore[reportMissingImports]

        lm = harness_model(stack, stack_params)
        found = lm_eval.simple_evaluate(model=lm, tasks=args.tasks.split(","), limit=args.limit)
        print(json.dumps(found["results"], indent=1, default=str))
        return

    lm = Adapter(stack, stack_params)
    question, answers = "The capital of France is", [" Paris", " Rome", " a cheese"]
    print(question)
    for answer, (logprob, greedy) in zip(answers, lm.loglikelihood([Request(question, a) for a in answers])):
        print(f"  {logprob:8.2f}  {answer}{'   <- what it would say' if greedy else ''}")
    text = "A canal is a river that someone has drawn with a ruler."
    print(f"{text}\n  {lm.loglikelihood_rolling([Request(text)])[0]:8.2f}")
    print(f"{question}{lm.generate_until([Request(question, {'until': ['.'], 'max_gen_toks': 12})])[0]}")


if __name__ == "__main__":
    main()
