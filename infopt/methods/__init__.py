"""Methods of rounding weights with a look at what goes through them: what `quantize(method=)` takes."""

from infopt.methods.autoround import AutoRound, autoround
from infopt.methods.awq import AWQ, awq
from infopt.methods.base import Method
from infopt.methods.distilled import Distilled, distilled
from infopt.methods.gptq import GPTQ, gptq
from infopt.methods.nearest import Nearest, nearest
from infopt.methods.smoothquant import SmoothQuant, smoothquant

METHODS = {
    "autoround": autoround,
    "awq": awq,
    "distilled": distilled,
    "gptq": gptq,
    "nearest": nearest,
    "smoothquant": smoothquant,
}
"""Factories by the names that a stack's text may use. A method joins by its file and a line here."""

__all__ = [
    "AWQ", "GPTQ", "METHODS", "AutoRound", "Distilled", "Method", "Nearest", "SmoothQuant",
    "autoround", "awq", "distilled", "gptq", "nearest", "smoothquant",
]  # fmt: skip
