"""Lightning reports, saves and restores the average."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import schedulefree
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim.integrations.lightning import AveragedEvaluation
from tests.helpers.comparing import Weights, same_weights, weights_of
from tests.helpers.expected_warnings import OF_LIGHTNING
from tests.helpers.regression import (
    BATCHES,
    HELD_X,
    HELD_Y,
    NUM_STEPS,
    Make,
    X,
    Y,
    adamw,
    everyone,
    has_other_average,
    held_out,
    loaded,
    looking,
    network,
    open_ended,
    ours,
    teleporting,
    train,
)

pytestmark = OF_LIGHTNING


class Fit(lightning.LightningModule):
    """Batches are taken by the number of the step, since Lightning begins at the first one when it resumes within an epoch.

    Measures everything that is held out at once, so that a mean over batches is exact.
    """

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make, self.network = make, network()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = BATCHES[self.trainer.global_step % len(BATCHES)]
        return F.mse_loss(self.network(inputs), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss", F.mse_loss(self.network(batch[0]), batch[1]))

    test_step = validation_step

    @property
    def optimizer(self) -> Any:
        return self.optimizers(use_pl_optimizer=False)

    def configure_optimizers(self) -> Any:
        return self.make(self.network, NUM_STEPS)


def schedule_free(model: nn.Module, num_steps: int) -> Any:
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)


class Watch(lightning.Callback):
    """Keeps the held-out loss of the iterates after every so many steps, and the weights of evaluation mode if it may look."""

    def __init__(self, every: int, is_looking: bool = True) -> None:
        self.every, self.is_looking = every, is_looking
        self.losses: dict[int, float] = {}
        self.weights: dict[int, Weights] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            self.losses[trainer.global_step] = held_out(pl_module.network)
            if not self.is_looking:
                return
            with looking(pl_module.optimizer):
                self.weights[trainer.global_step] = weights_of(pl_module.network)


def training_data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def held_out_data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(HELD_X, HELD_Y), batch_size=64)


def lightning_trainer(*callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    has_files = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=has_files,
        **{"max_epochs": 4, **quiet, **options},
    )


def measure(model: nn.Module, path: str | Path) -> float:
    """The loss that Lightning reports for a file."""
    return lightning_trainer().test(model, held_out_data(), ckpt_path=path, weights_only=True, verbose=False)[0]["loss"]


def contents(path: str | Path) -> Weights:
    """The weights of the network in a file, read without Lightning."""
    weights = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in weights.items()}


@everyone
@teleporting
@pytest.mark.parametrize(("is_averaged", "sanity"), [(False, 0), (True, 0), (True, 1)])
def test_lightning_tests_the_best_of_what_it_has_reported(
    make: Make, is_averaged: bool, sanity: int, tmp_path: Path
) -> None:
    model = Fit(make)
    files = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, save_last=True)
    watch = Watch(10, is_looking=False)
    own = [AveragedEvaluation()] if is_averaged else []
    trainer = lightning_trainer(*own, files, watch, num_sanity_val_steps=sanity)
    is_unseen = make is open_ended and not is_averaged
    with pytest.warns(UserWarning, match="the state of an open-ended run is saved") if is_unseen else nullcontext():
        trainer.fit(model, training_data(), held_out_data())
    assert len(files.best_k_models) == 4
    at_end = weights_of(model.network)
    for (path, score), (step, loss) in zip(files.best_k_models.items(), watch.losses.items(), strict=True):
        assert measure(Fit(make), path) == pytest.approx(float(score), rel=1e-6)
        assert held_out(loaded(contents(path))) == pytest.approx(float(score), rel=1e-6)
        assert (float(score) == pytest.approx(loss, rel=1e-6)) == (not is_averaged or not has_other_average(make, step))
    best = float(files.best_model_score)
    # In one call after another: none of them may leave other weights to the next.
    for path, expected in (("best", best), ("last", float(score)), ("best", best)):
        (result,) = trainer.test(model, held_out_data(), ckpt_path=path, weights_only=True, verbose=False)
        assert result["loss"] == pytest.approx(expected, rel=1e-6)
    (result,) = trainer.validate(model, held_out_data(), ckpt_path="best", weights_only=True, verbose=False)
    assert result["loss"] == pytest.approx(best, rel=1e-6)
    assert held_out(model.network) == pytest.approx(best, rel=1e-6)
    assert held_out(loaded(at_end)) == pytest.approx(float(score), rel=1e-6)


@pytest.mark.parametrize("make", [ours, open_ended, adamw, schedule_free])
@pytest.mark.parametrize("is_validated", [False, True])
@teleporting
def test_lightning_saves_the_average_between_two_batches(make: Make, is_validated: bool, tmp_path: Path) -> None:
    """And goes on from there as the run that was not interrupted, with the same files."""
    data = [held_out_data()] if is_validated else []
    model, watch = Fit(make), Watch(3)
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    lightning_trainer(AveragedEvaluation(), files, watch).fit(model, training_data(), *data)
    weights = weights_of(model.network)
    exact = {"rtol": 1e-4, "atol": 1e-5} if make is schedule_free else {"rtol": 0.0, "atol": 0.0}
    for step, seen in watch.weights.items():
        path = tmp_path / f"step={step}.ckpt"
        if make is not schedule_free:
            assert same_weights(contents(path), seen)
        assert (held_out(loaded(contents(path))) != watch.losses[step]) == (
            make is schedule_free or has_other_average(make, step)
        )
    for step in (3, 21):
        resumed, path = Fit(make), tmp_path / f"step={step}.ckpt"
        nn.init.zeros_(resumed.network[0].weight)
        lightning_trainer(AveragedEvaluation()).fit(resumed, training_data(), *data, ckpt_path=path, weights_only=True)
        torch.testing.assert_close(weights_of(resumed.network), weights, **exact)


@teleporting
@pytest.mark.parametrize("options", [{"every_n_train_steps": 3}, {"every_n_epochs": 1}])
def test_lightning_saves_the_average_where_weights_are_saved_alone(options: dict[str, int], tmp_path: Path) -> None:
    model, watch = Fit(open_ended), Watch(1)
    files = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_weights_only=True, **options)
    lightning_trainer(watch, AveragedEvaluation(), files).fit(model, training_data())
    plain = Fit(open_ended)
    lightning_trainer().fit(plain, training_data())
    plain.optimizer.eval()
    assert same_weights(weights_of(plain.network), weights_of(model.network))  # Saving has changed nothing.
    steps = range(3, 41, 3) if "every_n_train_steps" in options else range(10, 41, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step={step}.ckpt" for step in steps)
    for step in steps:
        assert same_weights(contents(tmp_path / f"step={step}.ckpt"), watch.weights[step])


@pytest.mark.parametrize("weights_only", [False, True])
def test_lightning_saves_inside_averaged(weights_only: bool, tmp_path: Path) -> None:
    """A file that a user saves there; the average stays in place until the context is left."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            iterates = weights_of(pl_module.network)
            with pl_module.optimizer.averaged():
                average = weights_of(pl_module.network)
                trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only)
                assert same_weights(weights_of(pl_module.network), average)
            assert same_weights(weights_of(pl_module.network), iterates)
            assert same_weights(contents(tmp_path / "own.ckpt"), average)

    model = Fit(open_ended)
    lightning_trainer(AveragedEvaluation(), Save(), max_steps=4).fit(model, training_data())
    assert model.optimizer.stats().num_steps == 4


class Adversaries(lightning.LightningModule):
    """Two networks, one optimizer of ours and one that has no modes."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), network(1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        for own, optimizer in zip((self.first, self.second), self.optimizers()):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(F.mse_loss(own(batch[0]), batch[1]))
            optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("first", F.mse_loss(self.first(batch[0]), batch[1]))
        self.log("second", F.mse_loss(self.second(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return open_ended(self.first, 0), adamw(self.second, 0)


def test_lightning_with_several_optimizers(tmp_path: Path) -> None:
    model = Adversaries()
    files = ModelCheckpoint(tmp_path, monitor="first", save_top_k=-1)
    lightning_trainer(AveragedEvaluation(), files).fit(model, training_data(), held_out_data())
    for path, score in files.best_k_models.items():
        fresh = Adversaries()
        measured = lightning_trainer().validate(fresh, held_out_data(), path, weights_only=True, verbose=False)[0]
        assert measured["first"] == pytest.approx(float(score), rel=1e-6)
    alone = network(1)
    train(alone, adamw(alone, 0), range(NUM_STEPS))
    assert same_weights(weights_of(alone), weights_of(model.second))


@pytest.mark.parametrize("is_validating", [False, True])
@pytest.mark.parametrize("save_weights_only", [False, True])
def test_lightning_is_interrupted(is_validating: bool, save_weights_only: bool, tmp_path: Path) -> None:
    """A file that is saved then is one of evaluation mode, too."""

    class Interrupted(Fit):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            if self.trainer.global_step == 17 and not is_validating:
                raise RuntimeError("stop")
            return super().training_step(batch)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            if self.trainer.global_step == 20:
                raise RuntimeError("stop")

    model = Interrupted(open_ended)
    own = {"save_on_exception": True, "save_weights_only": save_weights_only}
    files = ModelCheckpoint(tmp_path, filename="stopped", every_n_epochs=100, **own)
    with pytest.raises(RuntimeError, match="stop"):
        lightning_trainer(AveragedEvaluation(), files).fit(model, training_data(), held_out_data())
    plain = network()
    optimizer = open_ended(plain, 0)
    train(plain, optimizer, range(20 if is_validating else 17))
    optimizer.eval()
    assert same_weights(contents(tmp_path / "stopped.ckpt"), weights_of(plain))


def test_without_lightning_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, AveragedEvaluation.__module__)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(AveragedEvaluation.__module__)
