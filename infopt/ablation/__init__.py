"""The ablation: what each stack costs in quality, takes in bytes and gains in speed, beside the model it is made of.

`run.py` measures, a row a stack; `table.py` shows rows; `study.py` asks for many tables, out of a TOML file or for the
trade-offs of each transform alone; `command.py` is `infopt ablate`.
"""

from infopt.ablation.run import METRICS, MORE, STANDARD, ablate
from infopt.ablation.study import study, tradeoffs
from infopt.ablation.table import Row, Table

__all__ = ["METRICS", "MORE", "STANDARD", "Row", "Table", "ablate", "study", "tradeoffs"]
