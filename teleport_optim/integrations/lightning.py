"""PyTorch Lightning: validation and checkpoints with the average of the iterates."""

from __future__ import annotations

import copy
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError("teleport_optim.integrations.lightning needs PyTorch Lightning: pip install lightning") from error

__all__ = ["AveragedEvaluation"]


class AveragedEvaluation(Callback):
    """Validates and saves the average of the iterates, in runs of ``Trainer.fit``.

    The average is in the place of the parameters from the start of every validation until the next training batch, so that
    ``ModelCheckpoint`` saves what has been measured, and from the end of the run on. Files that are saved at other times hold it,
    too. Training resumes from each as if it had not stopped. ``Trainer.validate``, ``test`` and ``predict`` take the weights as
    they are, or as they are in the file.

    It calls ``eval()`` and ``train()`` of every optimizer that has both, of other libraries, too; the rest are left alone. Put it
    before other callbacks, so that they see the same weights.

    ``ModelCheckpoint(save_weights_only=True)`` with ``every_n_train_steps`` or ``train_time_interval`` costs a copy of the
    parameters in every step: Lightning does not tell callbacks of such files before they are saved. Nor does it of
    ``trainer.save_checkpoint(path, weights_only=True)``: call that in evaluation mode (``with optimizer.averaged():``) if it is
    called between two training batches.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[AveragedEvaluation()])
    """

    def __init__(self) -> None:
        self._is_evaluating = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the average out after the sanity check, or after loading a file."""
        # Having looked at the average once keeps an open-ended run from warning that nobody does.
        self._eval(trainer)
        self._train(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the average out."""
        self._train(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the average out."""
        self._train(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the average in if weights alone may be saved now."""
        if any(map(_saves_between_batches, _saving_weights_alone(trainer))):
            self._eval(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in if weights alone may be saved now."""
        if _saving_weights_alone(trainer):
            self._eval(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in; it stays beyond the end of validation, where checkpoints are saved."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._eval(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in for good."""
        self._eval(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the average in if weights alone are saved now."""
        if any(callback.save_on_exception for callback in _saving_weights_alone(trainer)):
            self._eval(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace what has been collected in training mode."""
        is_evaluating = self._is_evaluating or any(map(_is_of_evaluation, checkpoint["optimizer_states"]))
        if is_evaluating or trainer.state.fn != TrainerFn.FITTING:
            return
        self._eval(trainer)
        try:
            states = [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
            replaced = {"state_dict": trainer.strategy.lightning_module_state_dict(), "optimizer_states": states}
            checkpoint.update(copy.deepcopy(replaced))  # They hold the very tensors that are written to next.
        finally:
            self._train(trainer)

    def _eval(self, trainer: Trainer) -> None:
        self._is_evaluating = True
        for optimizer in _switchable(trainer):
            optimizer.eval()

    def _train(self, trainer: Trainer) -> None:
        for optimizer in reversed(_switchable(trainer)):  # Two may share parameters: the last to write is undone first.
            optimizer.train()
        self._is_evaluating = False


def _switchable(trainer: Trainer) -> list[Any]:
    """The optimizers that tell evaluation from training."""
    return [
        optimizer
        for optimizer in trainer.optimizers
        if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    ]


def _is_of_evaluation(state: dict[str, Any]) -> bool:
    """Whether the state of an optimizer of ours was saved inside a user's ``averaged()``, which is to go on."""
    return any(group.get("is_eval", False) for group in state.get("param_groups", ()))


def _saving_weights_alone(trainer: Trainer) -> list[ModelCheckpoint]:
    return [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only
    ]


def _saves_between_batches(callback: ModelCheckpoint) -> bool:
    """Whether it saves after some batches or minutes; also where Lightning has come to keep these numbers elsewhere."""
    every_n_steps: int = getattr(callback, "_every_n_train_steps", 1)
    return every_n_steps > 0 or getattr(callback, "_train_time_interval", None) is not None
