"""Lightning runs the plain loop. AdamW is the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.digits import (
    Make,
    assert_same,
    assert_teleports,
    everyone,
    loader,
    network,
    ours,
    reference,
    teleport_size,
    warned_of_a_schedule,
)
from tests.helpers.expected_warnings import OF_LIGHTNING

pytestmark = OF_LIGHTNING


class Digits(lightning.LightningModule):
    """Keeps the loss of every batch and the teleport of every step."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make, self.network = make, network()
        self.losses: list[float] = []
        self.sizes: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.sizes.append(teleport_size(optimizer))  # Lightning calls this before the step, so that it lags by one

    def on_train_end(self) -> None:
        self.sizes.append(teleport_size(self.optimizer))
        del self.sizes[0]

    @property
    def optimizer(self) -> Optimizer:
        return self.optimizers(use_pl_optimizer=False)  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return self.make(self.network, int(self.trainer.estimated_stepping_batches))


class ValidatedDigits(Digits):
    """Is validated as well."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        self.network(batch[0])


class ManualDigits(Digits):
    """Steps by itself, with clipping."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        return loss


class ScheduledDigits(Digits):
    """Halves the rate every other step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lightning_trainer(**options: Any) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", **{**quiet, "max_epochs": 3, **options})


@everyone
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"clip": 0.5}, {"accumulation": 3, "clip": 0.1}])
def test_lightning_runs_the_plain_loop(make: Make, options: dict[str, Any]) -> None:
    model = Digits(make)
    accumulation, clip = options.get("accumulation", 1), options.get("clip")
    lightning_trainer(accumulate_grad_batches=accumulation, gradient_clip_val=clip).fit(model, loader())
    assert_same(model.network, reference(make, 3, **options))
    assert model.losses[-1] < model.losses[0]
    assert_teleports(make, model.sizes)


@everyone
def test_lightning_manual_optimization(make: Make) -> None:
    model = ManualDigits(make)
    lightning_trainer().fit(model, loader())
    assert_same(model.network, reference(make, 3, clip=0.5))
    assert len(model.losses) == 21


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # there are no further checkpoints to save
@everyone
def test_lightning_resumes_bit_for_bit(make: Make, tmp_path: Path) -> None:
    model, resumed = Digits(make), Digits(make)
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    lightning_trainer(enable_checkpointing=True, callbacks=[checkpoints]).fit(model, loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=14.ckpt", "step=21.ckpt", "step=7.ckpt"]
    nn.init.zeros_(resumed.network[0].weight)
    lightning_trainer().fit(resumed, loader(), ckpt_path=tmp_path / "step=7.ckpt", weights_only=True)
    assert resumed.losses == model.losses[7:]
    assert resumed.sizes == model.sizes[7:]
    assert_same(resumed, model)


@everyone
def test_lightning_monitors_the_rate_of_a_schedule(make: Make, tmp_path: Path) -> None:
    model = ScheduledDigits(make)
    monitor = LearningRateMonitor("step")
    logger = CSVLogger(tmp_path)
    trainer = lightning_trainer(logger=logger, callbacks=[monitor], max_steps=6, log_every_n_steps=1)
    with warned_of_a_schedule(make):
        trainer.fit(model, loader())
    first = model.optimizer.defaults["lr"]
    ((name, rates),) = monitor.lrs.items()
    assert name == f"lr-{type(model.optimizer).__name__}"
    assert rates == [first * factor for factor in (1.0, 1.0, 0.5, 0.5, 0.25, 0.25)]


def test_lightning_validates_before_the_first_step() -> None:
    """The first call of the model is then in inference mode."""
    model = ValidatedDigits(ours)
    lightning_trainer(num_sanity_val_steps=2).fit(model, loader(), loader())
    assert_same(model.network, reference(ours, 3))
    assert_teleports(ours, model.sizes)


def test_lightning_mixed_precision() -> None:
    model = Digits(ours)
    lightning_trainer(precision="bf16-mixed").fit(model, loader())
    assert_teleports(ours, model.sizes)
    assert model.losses[-1] < model.losses[0]


class Called(Digits):
    """Is itself called in the training step, and so is the model of the optimizer."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self, int(self.trainer.estimated_stepping_batches))


class NeverCalled(Called):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])


def test_lightning_module_as_the_model() -> None:
    model = Called(ours)
    lightning_trainer().fit(model, loader())
    assert_teleports(ours, model.sizes)
    model = NeverCalled(ours)
    with pytest.warns(UserWarning, match=r"the model \(NeverCalled\) has not been called"):
        lightning_trainer().fit(model, loader())
    assert not any(model.sizes)
