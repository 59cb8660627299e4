"""Task families for meta-training, in one registry."""

from teleport_optim.tasks.families import TASKS
from teleport_optim.tasks.problem import InnerProblem, Task

__all__ = ["TASKS", "InnerProblem", "Task"]
