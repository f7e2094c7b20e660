"""What the README claims of stacks, a row each: (stack, metric, oracle, tolerance, seed), on the embedded model."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import infopt as ip
from infopt import testing
from infopt.errors import InfoptError


class Claim(NamedTuple):
    stack: str
    metric: str
    tolerance: float
    oracle: str = "base"
    seed: int = 0


DRAFT = "speculative(draft=self_draft(quantize(bits=4, group=32)), k=4)"
CLAIMS = [
    # exact transforms: the same tokens, greedy and sampled
    Claim("cache_kv()", "tokens", 0),
    Claim("cache_kv() | paged(16)", "tokens", 0, seed=1),
    Claim(f"cache_kv() | {DRAFT}", "tokens", 0, seed=2),
    Claim(f"cache_kv() | paged(16) | {DRAFT}", "tokens", 0, seed=3),
    Claim("cache_kv()", "kl", 1e-9),
    Claim("rotate() | cache_kv()", "tokens", 0, seed=4),
    # formats: what they cost in quality
    Claim("quantize(format='fp16')", "ppl", 0.0005),
    Claim("quantize(format='bf16')", "ppl", 0.001),
    Claim("quantize(bits=8)", "ppl", 0.003),
    Claim("quantize(bits=8, group=64)", "ppl", 0.002),
    Claim("quantize(bits=8, where='*')", "ppl", 0.007),
    Claim("cache_kv(bits=8)", "ppl", 0.001),
    Claim("cache_kv(bits=4)", "ppl", 0.06),
    Claim("quantize(bits=8)", "kl", 0.002),
    # what the split makes of 4-bit keys and values, by token 0.013; what GPTQ makes of int4, to nearest 0.036
    Claim("cache_kv(bits=4, split=32)", "kl", 0.001),
    Claim("quantize(bits=4, group=32, method='gptq')", "kl", 0.028),
    # inputs rounded too, which a rotation evens out
    Claim("quantize(bits=8, activations=8)", "kl", 0.002),
    Claim("rotate(online=True) | quantize(bits=8, activations=8)", "kl", 0.0008),
    # any stack is what the float64 model of its own Spec says
    Claim("quantize(bits=4, group=32) | sliding_window(16, sinks=2) | cache_kv()", "logits", 1e-4, "numpy"),
    Claim("gqa(4) | quantize(format='nf4') | cache_kv() | paged(8)", "logits", 1e-4, "numpy", 1),
    Claim("quantize(format='mxfp4') | cache_kv()", "logits", 1e-4, "numpy", 2),
    Claim("quantize(bits=2) | cache_kv()", "logits", 1e-4, "numpy", 3),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.metric}, {claim.stack}")
def test_the_claim_is_reproduced(claim: Claim) -> None:
    model, params = ip.load("tiny")
    testing.reproduces(model, params, **claim._asdict())


def test_the_embedded_model_is_as_good_as_its_files_say() -> None:
    """On another CPython's text nearly so."""
    model, params = ip.load("tiny")
    about = json.loads((Path(ip.__file__).parent / "data" / "tiny" / "training.json").read_text())
    same = ip.texts.digest(ip.texts.topics()) == about["heldout_text"]
    assert same or f"CPython {platform.python_version()}'" not in about["trained_on"]
    cut = ip.windows(ip.texts.topics(), 512, tokenizer=model.tokenizer).spread(8192)
    found = ip.measure(model, params, cut).ppl.value
    assert found == pytest.approx(about["sample_perplexity"], rel=1e-3 if same else 0.15)


def test_smollm2s_weights_lie_on_a_grid_of_four_bits_with_minima(smollm2: Path) -> None:
    """Groups of 32 with a scale and a minimum lose nothing of what its file holds; other grids do."""
    model, params = ip.load(smollm2)

    def errors(**arguments: Any) -> list[float]:
        stack = ip.quantize(where="layers.0.*", **arguments)(model)
        return [line.error for line in stack.audit(stack.convert(params)).lines if line.error is not None]

    assert len(errors(format="int4_min", group=32)) == 7
    assert max(errors(format="int4_min", group=32)) < 1e-6
    assert min(errors(bits=4, group=32)) > 0.05
    assert min(errors(format="int4_min", group=64)) > 0.05


# --------------------------------------------------------------------------------------------- what reproduces refuses

SMALL = ip.models.llama(vocab=61, dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp=32, context=64)
PARAMS = SMALL.init(jax.random.key(0))
TEXT = [n * n % 61 for n in range(400)]


@pytest.mark.parametrize("metric", ["logits", "tokens", "ppl", "kl", "top1"])
def test_a_claim_that_does_not_hold_is_a_mismatch(metric: str) -> None:
    with pytest.raises(testing.Mismatch, match=f"{metric} is off from 'base' by"):
        testing.reproduces(SMALL, PARAMS, "quantize(bits=2, group=16)", metric=metric, tolerance=1e-9, text=TEXT)


def test_what_is_no_number_is_a_mismatch() -> None:
    spoilt = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    with pytest.raises(testing.Mismatch, match="kl is off"):
        testing.reproduces(SMALL, spoilt, "cache_kv()", metric="kl", tolerance=1.0, text=TEXT)


def test_a_perplexity_that_is_known_otherwise_is_an_oracle() -> None:
    known = ip.measure(SMALL, PARAMS, ip.windows(TEXT, 64)).ppl.value
    options: dict[str, Any] = dict(metric="ppl", text=TEXT)
    assert testing.reproduces(SMALL, PARAMS, "cache_kv()", oracle=known, tolerance=1e-4, **options) < 1e-4
    with pytest.raises(testing.Mismatch):
        testing.reproduces(SMALL, PARAMS, "cache_kv()", oracle=known * 1.1, tolerance=0.05, **options)


@pytest.mark.parametrize(
    "options", [{"metric": "pppl"}, {"metric": "kl", "oracle": "numpy"}, {"metric": "kl", "oracle": 3}]
)
def test_a_claim_of_what_is_unknown_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InfoptError) as e:
        testing.reproduces(SMALL, PARAMS, "cache_kv()", tolerance=1, **options)
    assert e.value.why and e.value.fix
