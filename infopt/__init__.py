"""infopt: composable inference transforms for language models, in JAX.

What a user writes is `infopt.<name>`. The names are imported when first used, so that `infopt --help` does not wait
for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infopt import bench, models, testing, texts, train
    from infopt.ablation import Table, ablate
    from infopt.audit import Audit
    from infopt.budget import Fitted, Mixed, Sensitivity, fit_memory, mixed, sensitivity
    from infopt.cache import State, rollback
    from infopt.chat import Chat
    from infopt.errors import InfoptError, TransformOrderError
    from infopt.evaluate import (
        Agreement,
        Estimate,
        Scores,
        Windows,
        check_disjoint,
        difference,
        greedy_agreement,
        loglikelihood,
        measure,
        noise_floor,
        windows,
    )
    from infopt.generation import Chunk, Generation, generate, stream
    from infopt.interop import from_qwix, to_qwix
    from infopt.io import load
    from infopt.io.export import export
    from infopt.io.saved import save
    from infopt.methods import autoround, awq, distilled, gptq, nearest, smoothquant
    from infopt.model import Emitted, Model, Stream, define, trainable
    from infopt.nnx import from_nnx, to_nnx
    from infopt.planner import Plan, plan
    from infopt.qtensor import Format, QTensor
    from infopt.sampling import Sampling
    from infopt.spec import Codec, Config, Spec, Window, oracle
    from infopt.train import uptrain
    from infopt.transforms import (
        Transform,
        cache_kv,
        compose,
        dequantize,
        flash_attention,
        gqa,
        paged,
        parse_stack,
        quantize,
        rotate,
        self_draft,
        sliding_window,
        speculative,
    )

__version__ = "0.1.0"

_MODULES = ("bench", "models", "testing", "texts", "train")
_NAMES = {
    "ablation": ("Table", "ablate"),
    "audit": ("Audit",),
    "budget": ("Fitted", "Mixed", "Sensitivity", "fit_memory", "mixed", "sensitivity"),
    "cache": ("State", "rollback"),
    "chat": ("Chat",),
    "errors": ("InfoptError", "TransformOrderError"),
    "evaluate": (
        "Agreement",
        "Estimate",
        "Scores",
        "Windows",
        "check_disjoint",
        "difference",
        "greedy_agreement",
        "loglikelihood",
        "measure",
        "noise_floor",
        "windows",
    ),
    "generation": ("Chunk", "Generation", "generate", "stream"),
    "interop": ("from_qwix", "to_qwix"),
    "io": ("load",),
    "io.export": ("export",),
    "io.saved": ("save",),
    "methods": ("autoround", "awq", "distilled", "gptq", "nearest", "smoothquant"),
    "model": ("Emitted", "Model", "Stream", "define", "trainable"),
    "nnx": ("from_nnx", "to_nnx"),
    "planner": ("Plan", "plan"),
    "qtensor": ("Format", "QTensor"),
    "sampling": ("Sampling",),
    "spec": ("Codec", "Config", "Spec", "Window", "oracle"),
    "train": ("uptrain",),
    "transforms": (
        "Transform",
        "cache_kv",
        "compose",
        "dequantize",
        "flash_attention",
        "gqa",
        "paged",
        "parse_stack",
        "quantize",
        "rotate",
        "self_draft",
        "sliding_window",
        "speculative",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"infopt.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'infopt' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"infopt.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
