"""`hpc-supcon bench gpu`: proves and measures everything on one GPU within a budget of seconds.

`plan` has the stages and how the budget is shared; `runner` runs each in a process of its own; `record` is the file
with a stage's numbers; `work` is what a stage is given; `NAME_stage` measures; `targets` and `report` make the page.
"""

from .report import write_report
from .runner import bench_gpu

__all__ = ["bench_gpu", "write_report"]
