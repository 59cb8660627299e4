"""Task families for meta-training, in one registry.

A task family of your own is a subclass of :class:`Task` that is made without arguments; it is named by import path, as
``"package.module:ClassName"``.
"""

from __future__ import annotations

import difflib
import importlib

from teleport_optim.meta_training.tasks.convolutional import DigitsBatchNormCNN, DigitsCNN
from teleport_optim.meta_training.tasks.perceptrons import (
    DigitsAutoencoder,
    DigitsMLP,
    TeacherClassification,
    TeacherRegression,
)
from teleport_optim.meta_training.tasks.problem import InnerProblem, Task
from teleport_optim.meta_training.tasks.sequences import CharRecurrent, CharTransformer
from teleport_optim.meta_training.tasks.splits import SPLITS
from teleport_optim.meta_training.tasks.tabular import Tabular

__all__ = ["SPLITS", "TASKS", "InnerProblem", "Task", "find_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        DigitsMLP(),
        DigitsAutoencoder(),
        TeacherRegression(),
        TeacherClassification(),
        DigitsCNN(),
        DigitsBatchNormCNN(),
        CharTransformer(),
        CharRecurrent(),
        Tabular(),
    )
}
"""Every task family of the library by name; meta-training draws from all of them by default."""


def find_task(name: str) -> Task:
    """A task family by its name in ``TASKS``, or by import path as ``"package.module:ClassName"``.

    Raises:
        ValueError: if there is no such task, module or class.
        TypeError: if the class is not a :class:`Task`, has no name, or cannot be made without arguments.

    Example:
        >>> find_task("digits_mlp").name
        'digits_mlp'
    """
    if ":" in name:
        return _import_task(name)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no task {name!r}; did you mean {near!r}? There are {', '.join(TASKS)}, and tasks of your own "
            f"as 'package.module:ClassName'"
        )
    return TASKS[name]


def _import_task(path: str) -> Task:
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"the task {path!r} cannot be imported: {error}. Give the path as 'package.module:ClassName', and see that "
            f"the module can be imported from here"
        ) from error
    if not hasattr(module, class_name):
        tasks = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Task)]
        raise ValueError(
            f"the task {path!r} does not exist: {module_name} has no {class_name!r}; the tasks in it are {tasks}"
        )
    task_class = getattr(module, class_name)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise TypeError(f"{path!r} is not a task family: it must be a subclass of teleport_optim.meta_training.Task")
    if not isinstance(getattr(task_class, "name", None), str):
        raise TypeError(f"{path!r} has no name: set the class attribute 'name' to a string")
    try:
        return task_class()
    except TypeError as error:
        raise TypeError(f"{path!r} cannot be made without arguments: {error}") from error
