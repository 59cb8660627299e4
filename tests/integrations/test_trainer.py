"""The Trainer of Hugging Face runs the plain loop. AdamW is the control."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim import Optimizer

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.digits import (
    Make,
    X,
    Y,
    assert_same,
    assert_teleports,
    everyone,
    teleport_size,
    warned_of_a_schedule,
)


def vit(activation: str) -> transformers.PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=8, patch_size=4, num_channels=1, num_labels=10, hidden_act=activation, **shape
            )
        )


def bert() -> transformers.PreTrainedModel:
    """Reads the brightness of every pixel as a word, and drops out."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=17, max_position_embeddings=64, num_labels=10, hidden_act="relu", **shape
            )
        )


IMAGES = [{"pixel_values": image, "labels": label} for image, label in zip(X.view(-1, 1, 8, 8), Y.tolist())]
WORDS = [{"input_ids": (8 * (image + 0.6)).round().long(), "labels": label} for image, label in zip(X, Y.tolist())]


class Watch(transformers.TrainerCallback):
    """Keeps the teleport of every step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.sizes: list[float] = []

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.sizes.append(teleport_size(self.optimizer))


def hugging_face_trainer(
    make: Make,
    folder: Path,
    *,
    model: transformers.PreTrainedModel | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[transformers.Trainer, Optimizer, Watch]:
    """``options`` are of the Trainer, ``settings`` of its arguments."""
    model = model or bert()
    optimizer = make(model, 21 // settings.get("gradient_accumulation_steps", 1))
    watch = Watch(optimizer)
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**arguments, **settings}),
        train_dataset=WORDS if model.config.model_type == "bert" else IMAGES,
        callbacks=[watch],
        **(options or {"optimizers": (optimizer, transformers.get_constant_schedule(optimizer))}),
    )
    return trainer, optimizer, watch


def logged(trainer: transformers.Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@everyone
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_trainer_learns(make: Make, activation: str, tmp_path: Path) -> None:
    trainer, optimizer, watch = hugging_face_trainer(make, tmp_path, model=vit(activation))
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 21
    assert losses[-1] < losses[0]
    assert set(logged(trainer, "learning_rate")) == {optimizer.defaults["lr"]}
    assert_teleports(make, watch.sizes)
    if isinstance(optimizer, LearnedTeleportOptimizer):  # queries, values and layer norms scale with GELU too
        assert len(optimizer.spec) == {"relu": 6, "gelu": 5}[activation]


@everyone
@pytest.mark.parametrize("step", [7, 20])
def test_the_trainer_resumes_bit_for_bit(make: Make, step: int, tmp_path: Path) -> None:
    trainer, _, watch = hugging_face_trainer(make, tmp_path, save_strategy="steps", save_steps=step)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    resumed, _, resumed_watch = hugging_face_trainer(make, tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "loss") == logged(trainer, "loss")  # the log of the first part is in the checkpoint
    assert resumed_watch.sizes == watch.sizes[step:]
    assert_same(resumed.model, trainer.model)  # type: ignore[arg-type]


@everyone
def test_the_trainer_accumulates(make: Make, tmp_path: Path) -> None:
    trainer, optimizer, watch = hugging_face_trainer(make, tmp_path, gradient_accumulation_steps=3, max_steps=22)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="step .* lies past total_steps")
        trainer.train()
    assert {slots["step"].item() for slots in optimizer.state.values()} == {22.0}
    assert_teleports(make, watch.sizes)


@everyone
def test_the_trainer_adds_a_schedule_if_it_is_given_none(make: Make, tmp_path: Path) -> None:
    """Why examples/hugging_face_trainer.py hands over a constant one."""
    model = bert()
    optimizer = make(model, 21)
    trainer = hugging_face_trainer(make, tmp_path, model=model, options={"optimizers": (optimizer, None)})[0]
    with warned_of_a_schedule(make):
        trainer.train()
    first = optimizer.defaults["lr"]
    assert logged(trainer, "learning_rate") == pytest.approx([first * (1 - step / 21) for step in range(21)])
