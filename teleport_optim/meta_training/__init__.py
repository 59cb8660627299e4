"""Meta-training: learns the weights of a meta-optimizer from many small training runs.

What is needed to write a task of your own, and to start a run from Python::

    config = read_config("quick").with_settings(["tasks=my_module:MyTask", "run_dir=runs/mine"])
    learner = Learner(config)
    for report in learner.run():
        print(report)
    learner.export("mine.safetensors")
"""

from teleport_optim.meta_training.config import PRESETS, Config, read_config
from teleport_optim.meta_training.learner import Learner
from teleport_optim.meta_training.process_group import ProcessGroup, WorkerLostError, join
from teleport_optim.meta_training.run_folder import OuterStep
from teleport_optim.meta_training.tasks import TASKS, InnerProblem, Task, find_task
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import initial_params

__all__ = [
    "PRESETS",
    "TASKS",
    "Config",
    "Draw",
    "InnerProblem",
    "Learner",
    "OuterStep",
    "ProcessGroup",
    "Task",
    "WorkerLostError",
    "find_task",
    "initial_params",
    "join",
    "read_config",
]
