"""What timm, accelerate and the Trainer of Hugging Face report of an average is what they save."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.regression import (
    HELD_X,
    HELD_Y,
    NUM_STEPS,
    QUARTERS,
    Make,
    X,
    Y,
    adamw,
    everyone,
    held_out,
    loaded,
    looking,
    network,
    open_ended,
    ours,
    teleporting,
    train,
)


@everyone
@teleporting
@pytest.mark.usefixtures("registered")
def test_timm(make: Make, tmp_path: Path) -> None:
    """A network with batch normalisation, whose running statistics are in the file, too."""

    def resnet() -> nn.Module:
        return timm.create_model("test_resnet", in_chans=1, num_classes=4, stem_type="")

    def measured(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(images), labels).item()
        model.train()
        return loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
        model = resnet()
    own = {} if make is adamw else {"model": model, "total_steps": 12 if make is ours else None}
    name, lr = ("adamw", 1e-3) if make is adamw else ("teleport", 1.0)
    optimizer = create_optimizer_v2(model, name, lr=lr, weight_decay=0.1, **own)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), decreasing=True)
    reported = {}
    for step in range(1, 13):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step % 3 == 0:
            with looking(optimizer):
                reported[step] = measured(model)
                saver.save_checkpoint(step, reported[step])
    assert saver.best_metric == min(reported.values())
    for step, loss in reported.items():
        fresh = resnet()
        load_checkpoint(fresh, str(tmp_path / f"checkpoint-{step}.pth.tar"), weights_only=True)
        assert measured(fresh) == pytest.approx(loss, rel=1e-5)
    assert (measured(model) != reported[12]) == (make is open_ended)


@everyone
@teleporting
@pytest.mark.parametrize("is_averaged", [False, True])
def test_accelerate(make: Make, is_averaged: bool, tmp_path: Path) -> None:
    """Its optimizer knows train() and eval(); AdamW has neither, and it does nothing then."""
    if make is open_ended and not is_averaged:
        warning: Any = pytest.warns(UserWarning, match="the state of an open-ended run is saved")
    else:
        warning = nullcontext()
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, make(model, NUM_STEPS))
    reported = {}
    with warning:
        for start, end in pairwise((0, *QUARTERS)):
            optimizer.train()
            train(model, optimizer, range(start, end))
            if is_averaged:
                optimizer.eval()
            reported[end] = held_out(model)
            accelerator.save_state(str(tmp_path / str(end)))
    assert held_out(loaded(weights_of(accelerator.unwrap_model(model)))) == reported[NUM_STEPS]
    for end in QUARTERS:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        fresh = network(seed=9)
        fresh, other = accelerator.prepare(fresh, make(fresh, NUM_STEPS))
        accelerator.load_state(str(tmp_path / str(end)))
        assert held_out(fresh) == reported[end]
        other.train()
        train(fresh, other, range(end, NUM_STEPS))
        if is_averaged:
            other.eval()
        assert same_weights(weights_of(fresh), weights_of(model))


# Hugging Face's Trainer


class Regression(nn.Module):
    """What the Trainer trains: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.network(inputs)
        return {"loss": F.mse_loss(outputs, labels), "logits": outputs}


def rows(inputs: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    return [{"inputs": one, "labels": other} for one, other in zip(inputs, targets)]


@everyone
@teleporting
@pytest.mark.parametrize("patience", [3, 100])
def test_the_trainer_loads_the_best_model(make: Make, patience: int, tmp_path: Path) -> None:
    """It calls eval() before it measures, and saves then; with little patience it stops early."""
    model, max_steps = Regression(), 160 if patience == 3 else 40
    few_x, few_y = X[:16], Y[:16] + 0.5 * X[:16, 5:]  # Soon known by heart.
    optimizer = make(model, max_steps)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=max_steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=rows(few_x, few_y),
        eval_dataset=rows(HELD_X, HELD_Y),
        optimizers=(optimizer, transformers.get_constant_schedule(optimizer)),
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    trainer.train()
    reported = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(reported) >= 4
    assert (len(reported) < max_steps // 4) == (patience == 3)
    for step, loss in reported.items():
        fresh = Regression()
        fresh.load_state_dict(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
        assert held_out(fresh.network) == pytest.approx(loss, rel=1e-5)
    best = min(reported.values())
    assert trainer.state.best_metric == best
    assert held_out(model.network) == pytest.approx(best, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    assert held_out(loaded(weights_of(model.network))) == pytest.approx(best, rel=1e-5)
