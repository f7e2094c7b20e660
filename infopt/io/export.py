"""Dense models as Hugging Face folders: config.json and model.safetensors, which `transformers` loads."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infopt.errors import CheckpointError, nearest
from infopt.io import disk
from infopt.io.checkpoint import DTYPES, row_chunks
from infopt.io.huggingface import source
from infopt.io.tokenizer import Tokenizer
from infopt.model import FAMILIES, Model, Weights, check_params, shapes
from infopt.models.gemma3 import Gemma3Config
from infopt.models.llama import LlamaConfig
from infopt.spec import LinearRope, Llama3Rope, RopeScaling, Spec, TableRope, YarnRope, oracle
from infopt.typing import Params

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(folder: str | Path, model: Model, params: Params, dtype: str | None = None) -> None:
    """Write a dense model as a Hugging Face folder, for `transformers`, and for `ip.load`.

    config.json, model.safetensors, and tokenizer.json with its settings where the model has a tokenizer. A cache and
    its pages are left out, as they change nothing of what is computed; what the format cannot say is refused.

    Args:
      folder: a new folder, or an empty one. It is there whole or not at all.
      model, params: a model without packed weights and its params.
      dtype: of the weights: "float32", "bfloat16" or "float16"; by default each keeps its own.

    Raises:
      CheckpointError: weights are packed; the stack computes what a config.json cannot say; the family has no
        counterpart; the folder holds something or cannot be written.
      ParamsError: the params are not the model's.

    >>> import infopt as ip, jax, tempfile
    >>> model = ip.gqa(1)(ip.models.llama())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ip.export(folder + "/pooled", model, model.init(jax.random.key(0)))
    ...     ip.load(folder + "/pooled")[0].spec.config.kv_heads
    1
    """
    folder = Path(folder).expanduser().resolve()
    _check_stack(model)
    check_params(model.spec, params)
    if dtype is not None and dtype not in STORED:
        raise CheckpointError(
            f"weights cannot be exported as dtype={dtype!r}.",
            why=f"those that can be are {', '.join(STORED)}.",
            fix=nearest(str(dtype), list(STORED)),
        )
    weights = Weights.of(model.spec, jax.tree.map(np.asarray, params))
    types = {name: dtype or weights[name].dtype.name for name in shapes(model.spec)}
    if wrong := [name for name in types if types[name] not in STORED]:
        raise CheckpointError(
            f"{wrong[0]} cannot be exported: it is {types[wrong[0]]}.",
            why=f"the types that can be are {', '.join(STORED)}.",
            fix='dtype="float32"',
        )
    widest = max(types.values(), key=lambda name: DTYPES[name].itemsize)
    settings = CONFIGS[model.spec.family](model.spec.config) | {"torch_dtype": widest}
    if model.tokenizer is not None:
        ids = [*model.tokenizer.eos_ids]
        settings["eos_token_id"] = (ids if len(ids) > 1 else ids[0]) if ids else None
    with disk.written_beside(folder) as temporary:
        if not disk.is_free(folder):
            raise CheckpointError(
                f"{folder} is there already, and is left alone.",
                why="overwriting might lose something.",
                fix="give another folder, or remove this one",
            )
        _write_json(temporary / "config.json", settings)
        if model.tokenizer is not None:
            _write_tokenizer(temporary, model.tokenizer)
        _write_safetensors(temporary / "model.safetensors", model.spec, weights, types)
        disk.sync(temporary)
        os.rename(temporary, folder)  # fails on a folder that somebody else has filled meanwhile
        disk.sync_entries(folder.parent)


def _check_stack(model: Model) -> None:
    """Raise unless a config.json can say all that the stack computes."""
    spec = model.spec
    if spec.family not in CONFIGS:
        raise CheckpointError(
            f"a model of the family {spec.family!r} cannot be exported.",
            why=f"those with a counterpart in transformers are {', '.join(CONFIGS)}.",
            fix="ip.save keeps it, for ip.load",
        )
    if spec.program is not None:
        raise CheckpointError(
            "a speculative stack cannot be exported.",
            why="it is two models, and the format holds one.",
            fix="export its target, params['target'], with the model before speculative(...)",
        )
    if spec.weights:
        raise CheckpointError(
            f"packed weights cannot be exported: {spec.weights[0][0]} is packed as {spec.weights[0][1].name}.",
            why="transformers has other packings.",
            fix="dense = ip.dequantize()(model); ip.export(folder, dense, dense.convert(params, source=model))",
        )
    plain = Model.of(FAMILIES[spec.family], spec.config).spec
    if oracle(spec) != plain:
        different = "windows" if spec.window != plain.window else "rounded keys and values"
        raise CheckpointError(
            f"a stack with {different} that the family does not have cannot be exported.",
            why=f"a config.json of {spec.family} cannot say them, and the folder would compute something else.",
            fix="export the model before sliding_window(...) and cache_kv(bits=...), with its params",
        )
    if model.tokenizer is not None and not isinstance(model.tokenizer, Tokenizer):
        raise CheckpointError(
            f"a {type(model.tokenizer).__name__} cannot be exported as the model's tokenizer.",
            why="a tokenizer.json is what is written of it.",
            fix="dataclasses.replace(model, tokenizer=None)",
        )


# ---------------------------------------------------------------------------------------------------------- the configs


def _common(c: Any, architecture: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        # Said, or transformers' defaults for the class would mean tokens of another vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _rope_scaling(s: RopeScaling | None) -> dict[str, Any] | None:
    match s:
        case None:
            return None
        case LinearRope():
            return {"rope_type": "linear", "factor": s.factor}
        case Llama3Rope():
            return {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            }
        case YarnRope():
            return {
                "rope_type": "yarn",
                "factor": s.factor,
                "original_max_position_embeddings": s.original_context,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "attention_factor": s.attention_factor,
                "truncate": s.truncate,
            }
        case TableRope():
            raise CheckpointError(
                "a model whose positions are stretched by a table cannot be exported.",
                why="the published form holds two tables, for short and for long texts, and one of them is here.",
                fix="ip.save keeps it, for ip.load",
            )


def _llama(c: LlamaConfig) -> dict[str, Any]:
    return _common(c, "LlamaForCausalLM", "llama") | {
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_scaling": _rope_scaling(c.rope_scaling),
    }


def _gemma3(c: Gemma3Config) -> dict[str, Any]:
    local = [window is not None for window in c.windows()]
    scale = c.query_scale
    settings = _common(c, "Gemma3ForCausalLM", "gemma3_text") | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "sliding_window": c.window,
        "layer_types": ["sliding_attention" if near else "full_attention" for near in local],
        "rope_local_base_freq": c.local_rope_theta,
        "rope_scaling": _rope_scaling(c.rope_scaling),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if c.pattern == (True,) * (c.period - 1) + (False,):  # what releases before layer_types read
        settings["sliding_window_pattern"] = c.period
    return settings


CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {"llama": _llama, "gemma3": _gemma3}
"""By family: its config.json, in the older spelling, which every release reads: one that knows only it would take a
missing `rope_theta` for 10000 without a word. A family joins by one line."""


# ---------------------------------------------------------------------------------------------------------- the files


def _published_name(spec: Spec, logical: str) -> str:
    (name,) = source(spec.family, spec.config, logical, shapes(spec)[logical], "model.", "lm_head.weight").files
    return name


def _write_safetensors(path: Path, spec: Spec, weights: Weights, types: dict[str, str]) -> None:
    """One weight after another: the library's own writer takes a copy of all of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes(spec).items():
        start, end = end, end + math.prod(shape) * DTYPES[types[name]].itemsize
        header[_published_name(spec, name)] = {
            "dtype": STORED[types[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes(spec):
            for chunk in _chunks(weights[name], DTYPES[types[name]]):
                file.write(chunk.tobytes())


def _chunks(x: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    return (x[part].astype(dtype) for part in row_chunks(x.shape))


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.eos_ids:
        settings["eos_token"] = tokenizer.backend.id_to_token(tokenizer.eos_ids[0])
    if (template := tokenizer.template) is not None:
        settings |= template.special
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        if template.tool_use is not None:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template.tool_use, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
