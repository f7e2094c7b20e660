"""How the embedded model `tiny` was made: its tokenizer, its training, its held-out loss.

    python examples/train_tiny.py                    # the first steps, beside those of the shipped one's run
    python examples/train_tiny.py --all --out tiny/  # the whole run (half an hour on two cores; goes on where it was)

The text is this Python's own: documentation topics but for the held-out ones, twice, and the standard library's
docstrings once. The shipped weights saw CPython 3.11.7's; another version's text gives nearly, not exactly, their loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import infopt as ip
from infopt import texts
from infopt.io.tokenizer import Tokenizer
from infopt.train import Training, fit, loss_of

SHIPPED = Path(ip.__file__).parent / "data" / "tiny"
PLANS = (  # texts of 256 tokens are read in two thirds of the time; those of 512 teach the longer distances
    Training(steps=900, batch=16, length=256, accumulate=4, rate=4e-3, warmup=100, final=0.3, decay=0.4),
    Training(steps=500, batch=8, length=512, accumulate=4, rate=1.5e-3, warmup=20, final=0.03, decay=0.4),
)
SHAPE = dict(vocab=1024, dim=128, layers=5, heads=8, kv_heads=8, head_dim=16, mlp=384, context=512, tied=True)
START = "<|endoftext|>"


def make_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE of 1,024 words; each text begins with the one special token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab"], special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return Tokenizer(backend, (0,))


def prepare(new: bool) -> tuple[Tokenizer, np.ndarray]:
    """A tokenizer, and the training text in its tokens, in a seeded order of its documents."""
    documents = texts.documents("training") * 2 + texts.docstrings()
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    tokenizer = make_tokenizer(documents) if new else ip.load("tiny")[0].tokenizer
    text = encode(tokenizer, documents)
    print(f"training text: {len(text):,} tokens, of {sum(map(len, documents)) / len(text):.2f} characters each")
    return tokenizer, text


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """One long text, the special token before each document."""
    return np.concatenate([tokenizer.encode(document) for document in documents])


def heldout_loss(model: ip.Model, params: Any, tokens: np.ndarray) -> float:
    """Nats a token over the whole held-out text, in texts of 512 tokens apart."""
    rows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)
    found = jax.jit(lambda p, rows: loss_of(model, p, rows))
    return float(np.mean([found(params, row[None]) for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="train to the end")
    parser.add_argument("--steps", type=int, default=4, help="without --all: steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="with --all: the Hugging Face folder to write")
    parser.add_argument("--checkpoints", type=Path, help="a folder from which a run that was stopped goes on")
    args = parser.parse_args()

    tokenizer, text = prepare(new=args.all)
    heldout, other = encode(tokenizer, texts.documents()), encode(tokenizer, texts.documents("calibration"))
    # Documentation has stock phrases, of up to some 80 tokens here: shorter runs are shared.
    ip.check_disjoint([encode(tokenizer, [each]) for each in texts.documents("training")], heldout, n=128)
    model = dataclasses.replace(ip.models.llama(**SHAPE), tokenizer=tokenizer)
    start = model.init(jax.random.key(0))
    if args.all:
        params, losses = start, []
        for i, plan in enumerate(PLANS):
            folder = args.checkpoints / str(i) if args.checkpoints else None
            params, found = fit(model, params, text, plan, folder=folder, every=50)
            losses += found.tolist()
            print(f"after {len(losses)} steps: {found[-50:].mean():.4f} nats a token, ", end="")
            print(f"calibration split {heldout_loss(model, params, other):.4f}", flush=True)
        if args.out:
            ip.export(args.out, model, params)
            documents = texts.documents("training") + texts.docstrings()
            sample = ip.windows(texts.topics(), 512, tokenizer=tokenizer).spread(8192)
            about = {
                "trained_on": f"CPython {platform.python_version()}'s documentation topics and docstrings",
                "training_text": texts.digest("\n\n".join(documents)),
                "heldout_text": texts.digest(texts.topics()),
                "heldout_loss": round(heldout_loss(model, params, heldout), 4),
                "sample_perplexity": round(ip.measure(model, params, sample).ppl.value, 3),
                "plans": [dataclasses.asdict(plan) for plan in PLANS],
                "losses": [round(loss, 4) for loss in losses],
                "versions": {name: importlib.metadata.version(name) for name in ("jax", "optax", "tokenizers")},
            }
            (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
        return
    about = json.loads((SHIPPED / "training.json").read_text())
    loss = heldout_loss(*ip.load("tiny"), heldout)
    print(f"shipped: held out {loss:.4f} nats a token; {about['heldout_loss']} on {about['trained_on']}")
    _, losses = fit(model, start, text, PLANS[0], until=args.steps, progress=False)
    for step, (now, then) in enumerate(zip(losses, about["losses"])):
        print(f"step {step}: {now:.4f} nats a token, then {then:.4f}")
    documents = texts.documents("training") + texts.docstrings()
    if texts.digest("\n\n".join(documents)) == about["training_text"]:
        assert max(abs(now - then) for now, then in zip(losses, about["losses"])) < 0.1, "not the run that made it"
    else:
        print("this Python's text is another: losses are near, not equal")


if __name__ == "__main__":
    main()
