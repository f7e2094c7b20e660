"""Small GGUF files for the readers' tests, and the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

sys.path.insert(0, str(Path(__file__).parent))
import kquants


class GGUF:
    """What goes into a GGUF file; a test changes it before it is written."""

    def __init__(self, arch: str, fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]]) -> None:
        self.arch, self.fields, self.tensors = arch, fields, tensors

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.arch)
        for key, value in self.fields.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
                add[type(value)](key, value)
        for name, (x, kind) in self.tensors.items():
            kind = GGMLQuantizationType[kind]
            blocks = kquants.quantize(x, kind.name) if kind.name in kquants.SIZES else quants.quantize(x, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _model(
    arch: str, kind: str, sizes: dict[str, int], tied: bool, extra: dict[str, tuple[int, ...]], fields: dict[str, Any]
) -> GGUF:
    rng = np.random.default_rng(0)
    d, f, q, kv = sizes["dim"], sizes["mlp"], sizes["heads"] * sizes["head_dim"], sizes["kv"] * sizes["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (sizes["vocab"], d), "output_norm": (d,)}
    if not tied:
        shapes["output"] = (sizes["vocab"], d)
    for i in range(sizes["layers"]):
        layer = {
            "attn_norm": (d,),
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_norm": (d,),
            "ffn_gate": (f, d),
            "ffn_up": (f, d),
            "ffn_down": (d, f),
            **extra,
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {
        f"{name}.weight": (rng.standard_normal(shape).astype(np.float32), kind if len(shape) == 2 else "F32")
        for name, shape in shapes.items()
    }
    return GGUF(arch, {
        f"{arch}.block_count": sizes["layers"], f"{arch}.context_length": 64, f"{arch}.embedding_length": d,
        f"{arch}.feed_forward_length": f, f"{arch}.attention.head_count": sizes["heads"],
        f"{arch}.attention.head_count_kv": sizes["kv"], f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.attention.key_length": sizes["head_dim"], f"{arch}.vocab_size": sizes["vocab"], **fields,
    }, tensors)  # fmt: skip


@pytest.fixture(scope="session")
def llama_gguf() -> Callable[..., GGUF]:
    """`llama_gguf(kind, tied=True, **sizes)`: a random Llama, its matrices stored as `kind`."""

    def make(kind: str = "F32", tied: bool = True, **sizes: int) -> GGUF:
        base = {"vocab": 96, "dim": 64, "layers": 2, "heads": 4, "kv": 2, "head_dim": 16, "mlp": 96}
        return _model("llama", kind, base | sizes, tied, {}, {"llama.rope.freq_base": 10000.0})

    return make


@pytest.fixture
def gemma3_gguf() -> Callable[..., GGUF]:
    """`gemma3_gguf(kind, **sizes)`: a random Gemma 3."""

    def make(kind: str = "F32", **sizes: int) -> GGUF:
        base = {"vocab": 96, "dim": 64, "layers": 7, "heads": 2, "kv": 1, "head_dim": 32, "mlp": 96} | sizes
        norms = {
            "attn_q_norm": (base["head_dim"],),
            "attn_k_norm": (base["head_dim"],),
            "post_attention_norm": (base["dim"],),
            "post_ffw_norm": (base["dim"],),
        }
        return _model(
            "gemma3", kind, base, True, norms, {"gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e6}
        )

    return make


MEASURE = """
import json, sys, threading, time
import jax, orbax.checkpoint, infopt  # orbax is imported, and the backend made, before anything is counted
from infopt.io import load

jax.block_until_ready(jax.numpy.zeros(1))

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model, params = load(sys.argv[1], sys.argv[2])
jax.block_until_ready(params)
done = True
thread.join()
print(json.dumps([max(peak, anonymous()) - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.fixture
def anonymous_memory() -> Callable[[Path, str], tuple[int, int]]:
    """`anonymous_memory(path, dtype)`: bytes that loading took at its peak, above the import's, and the params' own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RssAnon is read from Linux's /proc")

    def measure(path: Path, dtype: str) -> tuple[int, int]:
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), dtype],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        return tuple(json.loads(run.stdout))

    return measure
