"""Methods of rounding weights with a look at what goes through them: what `quantize(method=)` takes."""

from infopt.methods.autoround import AutoRound, autoround
from infopt.methods.base import Method
from infopt.methods.distilled import Distilled, distilled
from infopt.methods.gptq import GPTQ, gptq

METHODS = {"autoround": autoround, "distilled": distilled, "gptq": gptq}
"""Factories by the names that a stack's text may use. A method joins by its file and a line here."""

__all__ = ["GPTQ", "METHODS", "AutoRound", "Distilled", "Method", "autoround", "distilled", "gptq"]
