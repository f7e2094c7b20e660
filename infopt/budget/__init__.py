"""Where bits are needed: what rounding each matrix alone costs, and formats matrix by matrix under a budget.

`alone.py` runs a model with some matrices rounded; `sensitivity.py` asks it for each matrix or layer; `allocation.py`
chooses formats; `rules.py` says a choice in a few patterns; `mixed.py` joins them; `memory.py` shares bytes between
weights and a cache.
"""

from infopt.budget.memory import Fitted, fit_memory
from infopt.budget.mixed import Mixed, mixed
from infopt.budget.sensitivity import Sensitivity, sensitivity

__all__ = ["Fitted", "Mixed", "Sensitivity", "fit_memory", "mixed", "sensitivity"]
