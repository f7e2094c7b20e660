"""infopt beside llama.cpp, transformers and qwix: the same file, the same windows, the same code that measures.

pip install -e ".[peers]" && python examples/compare_peers.py --windows 8

A peer is a function from tokens to logits. One that is not installed is said to be missing, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import infopt as ip
from infopt.io import hub

LENGTH = 512  # tokens of a window

Measured = tuple[Any, Any]
"""What `ip.measure` takes: a model and its params, or a function and None."""


def stack(transform: ip.Transform, model: ip.Model, params: Any) -> Measured:
    return transform(model), transform(model).convert(params)


def transformers(path: Path) -> Measured:
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch, library = importlib.import_module("torch"), importlib.import_module("transformers")
    net = library.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(tokens).long()).logits.numpy()

    return logits, None


def llama_cpp_python(path: Path) -> Measured:
    library = importlib.import_module("llama_cpp")
    llm = library.Llama(str(path), n_ctx=LENGTH, n_batch=LENGTH, n_ubatch=LENGTH, logits_all=True, verbose=False)

    def logits(tokens: np.ndarray) -> np.ndarray:
        out = []
        for row in tokens:
            llm.reset()
            llm.eval(row.tolist())
            out.append(np.array(llm.scores[: len(row)], np.float32))
        return np.stack(out)

    return logits, None


def cyllama(path: Path) -> Measured:
    library = importlib.import_module("cyllama.llama.llama_cpp")

    class Net(library.LlamaModel):
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which get_logits_ith asks for, and 0.2.18 lacks

    library.disable_logging()
    library.ggml_backend_load_all()
    net, options = Net(str(path), library.LlamaModelParams()), library.LlamaContextParams()
    options.n_ctx = options.n_batch = options.n_ubatch = LENGTH
    context = library.LlamaContext(net, options)

    def logits(tokens: np.ndarray) -> np.ndarray:
        out = []
        for row in tokens:
            context.kv_cache_clear()
            batch = library.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
            batch.set_batch(row.tolist(), 0, True)
            context.decode(batch)
            out.append(np.array([context.get_logits_ith(i) for i in range(len(row))], np.float32))
        return np.stack(out)

    return logits, None


def qwix(bits: int, model: ip.Model, params: Any) -> Measured:
    """qwix rounds each matrix `[layers, out, in]` that `ip.quantize` would; its values run in our forward."""
    library = importlib.import_module("qwix")
    packed = jax.eval_shape(ip.quantize(bits=8)(model).convert, params)

    @jax.jit
    def rounded(w: jax.Array) -> jax.Array:
        if bits == 8:
            return library.dequantize(library.quantize(w, jnp.int8, channelwise_axes=(0, 1)))
        return library.dequantize(library.quantize(w, jnp.int4, channelwise_axes=(0, 1), tiled_axes={2: 32}))

    def one(place: Any, w: Any) -> Any:
        return rounded(w) if isinstance(place, ip.QTensor) else w

    return model, jax.tree.map(one, packed, params, is_leaf=lambda x: isinstance(x, ip.QTensor))


def rows(model: ip.Model, params: Any, path: Path) -> Iterator[tuple[str, str, str, Callable[[], Measured]]]:
    """Of each row its name, the packages that it needs, what is measured, and how to come by it."""
    yield "infopt float32", "", "the file's weights, dequantised", lambda: (model, params)
    int8, int4 = ip.quantize(bits=8), ip.quantize(bits=4, group=32)
    yield "infopt int8", "", f"{int8}, float32 activations", functools.partial(stack, int8, model, params)
    yield "infopt int4", "", f"{int4}, float32 activations", functools.partial(stack, int4, model, params)
    what = "weights by its own reader of GGUF, in float32"
    yield "transformers float32", "torch transformers", what, functools.partial(transformers, path)
    what = "the file as it is, its own kernels, which round activations; keys and values in float16, its default"
    has_python = importlib.util.find_spec("llama_cpp") is not None
    peer, package = (llama_cpp_python, "llama-cpp-python") if has_python else (cyllama, "cyllama")
    yield "llama.cpp", package, what, functools.partial(peer, path)
    for bits, scales in ((8, "a scale a channel"), (4, "groups of 32")):
        what = f"weights by qwix.quantize, {scales}, dequantised; infopt's forward in float32"
        yield f"qwix int{bits} weights", "qwix", what, functools.partial(qwix, bits, model, params)


def versions(packages: str) -> str:
    found = [f"{package} {metadata.version(package)}" for package in packages.split()]
    if packages == "cyllama":
        built = json.loads(resources.files("cyllama").joinpath("build_config.json").read_text("utf-8"))
        found.append(f"which holds llama.cpp {built['versions']['llama_cpp_version']}")
    return ", ".join(found)


def interval(x: ip.Estimate, digits: int, times: float = 1) -> str:
    return f"{x.value * times:.{digits}g} [{x.low * times:.{digits}g}, {x.high * times:.{digits}g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"a .gguf file, or one of {', '.join(hub.NAMES)}")
    parser.add_argument("--windows", type=int, default=2, metavar="N", help=f"windows of {LENGTH} tokens (2)")
    parser.add_argument("--alone", action="store_true", help="measure what is here, though no peer is installed")
    args = parser.parse_args()
    if not args.alone and not any(map(importlib.util.find_spec, ("transformers", "llama_cpp", "cyllama"))):
        print("no peer is installed: pip install torch transformers cyllama; or --alone, for infopt's own rows")
        return
    try:
        path = Path(args.model) if args.model.endswith(".gguf") else hub.resolve(args.model)
        model, params = ip.load(path)
        cut = ip.windows(ip.texts.topics(), LENGTH, tokenizer=model.tokenizer).sample(args.windows)
    except ip.InfoptError as error:
        parser.error(error.one_line)

    print(f"{path.name}; held-out topics of CPython, {len(cut)} windows of {LENGTH} tokens, {cut.scored} tokens scored")
    print(f"windows {cut.digest}\ninfopt {ip.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("KL and top-1 are against infopt float32; [95% intervals] are a bootstrap's over windows\n")
    form = "{:<21} {:<27} {:<32} {:<30} {:<8} {}"
    print(form.format("", "perplexity", "beside float32, %", "KL, 1e-3 nats", "its 99%", "top-1, %"))
    base, notes, warning = None, [], ""
    for name, packages, what, made in rows(model, params, path):
        try:
            measured, said = made(), versions(packages)
        except ImportError as error:
            print(f"{name:<21} not measured: {error}; pip install {packages}", flush=True)
            continue
        scores = ip.measure(*measured, cut, (model, params), batch=1)
        base = base or scores
        beside = ip.difference(scores, base, "ppl", relative=True)
        numbers = (interval(scores.ppl, 6), interval(beside, 3, 100), interval(scores.kl, 3, 1e3))
        kl99 = f"{scores.kl99.value * 1e3:.3g}"
        print(form.format(name, *numbers, kl99, interval(scores.top1, 4, 100)), flush=True)
        notes.append(f"{name}: {what}" + (f" ({said})" if said else ""))
        warning = scores.ppl.note
    print("\n" + "\n".join([*notes, warning]).rstrip())


if __name__ == "__main__":
    main()
