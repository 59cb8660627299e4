"""Training loops as people write them: what is reported is what is saved, and everybody computes with the parameters.

torch's AdamW is the control: it passes the same tests wherever they make sense for it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import schedulefree
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from timm.models import load_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim import LearnedTeleportOptimizer, find_symmetries
from teleport_optim.integrations.lightning import AveragedEvaluation
from teleport_optim.optim import rule as update

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),  # Lightning, of its own code
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # on machines with more cores
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # other callbacks than while training
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

Make = Callable[..., Optimizer]
Weights = dict[str, Tensor]


def ours(model: nn.Module, num_steps: int, **options: Any) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=num_steps, **options)


def open_ended(model: nn.Module, num_steps: int, **options: Any) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, **options)


def adamw(model: nn.Module, num_steps: int, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


everyone = pytest.mark.parametrize("make", [ours, open_ended, adamw])

NUM_STEPS = 40
QUARTERS = (10, 20, 30, 40)
GENERATOR = torch.Generator().manual_seed(0)


def target_of(inputs: Tensor) -> Tensor:
    return torch.tanh(3 * inputs[:, :1]) * inputs[:, 1:2] + 0.3 * inputs[:, 2:3].square()


X = torch.randn(80, 6, generator=GENERATOR)
Y = target_of(X) + 0.3 * torch.randn(80, 1, generator=GENERATOR)
HELD_X = torch.randn(64, 6, generator=GENERATOR)
HELD_Y = target_of(HELD_X)
BATCHES = list(zip(X.split(8), Y.split(8)))
"""Ten: an epoch is a quarter of a run."""


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 1)]
        return nn.Sequential(*layers)


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return F.mse_loss(model(HELD_X), HELD_Y).item()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        inputs, targets = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def weights_of(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copy_of(model: nn.Module) -> nn.Module:
    """A model of the same weights that no optimizer has seen."""
    other = network()
    other.load_state_dict(weights_of(model))
    return other


def loaded(weights: Weights) -> nn.Module:
    model = network(seed=9)
    model.load_state_dict(weights)
    return model


def looking(optimizer: Optimizer) -> AbstractContextManager[None]:
    return optimizer.averaged() if isinstance(optimizer, LearnedTeleportOptimizer) else nullcontext()


def has_other_average(make: Make, step: int) -> bool:
    """Whether the average differs from the parameters after that many steps of NUM_STEPS."""
    return make is open_ended or (make is ours and step < NUM_STEPS - 2)


@pytest.fixture
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teleports in every quarter of a short run."""
    monkeypatch.setattr(update, "TELEPORT_INTERVAL", 5)


# What is reported is what is saved: loops that are written by hand.


def report_and_save(
    called: nn.Module, optimizer: Optimizer, make: Make, is_averaged: bool, save: Callable[[], Any]
) -> list[tuple[float, Any]]:
    """The loss that is reported and what is saved, at 25, 50, 75 and 100 % of a run."""
    pairs = []
    for start, end in pairwise((0, *QUARTERS)):
        train(called, optimizer, range(start, end))
        with looking(optimizer) if is_averaged else nullcontext():
            pairs.append((held_out(called), save()))
        if is_averaged:  # It does matter which of the two is measured.
            assert (held_out(called) != pairs[-1][0]) == has_other_average(make, end)
    return pairs


in_both_ways = pytest.mark.parametrize("is_averaged", [False, True])
teleporting = pytest.mark.usefixtures("often_controlled")


@everyone
@in_both_ways
@teleporting
def test_a_plain_loop(make: Make, is_averaged: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = make(model, NUM_STEPS)
    files = (tmp_path / f"{number}.pt" for number in range(4))

    def save() -> Path:
        path = next(files)
        torch.save(model.state_dict(), path)
        return path

    for reported, path in report_and_save(model, optimizer, make, is_averaged, save):
        assert held_out(loaded(torch.load(path, weights_only=True))) == reported


@everyone
@teleporting
@pytest.mark.parametrize(("is_averaged", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_a_compiled_model(make: Make, is_averaged: bool, backend: str) -> None:
    torch.compiler.reset()
    model = network()
    called: Any = torch.compile(model, backend=backend)
    optimizer = make(model, NUM_STEPS)
    for reported, weights in report_and_save(called, optimizer, make, is_averaged, lambda: weights_of(model)):
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-5)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@everyone
@in_both_ways
@teleporting
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(make: Make, is_averaged: bool) -> None:
    called = DistributedDataParallel(network())
    optimizer = make(called, NUM_STEPS)
    pairs = report_and_save(called, optimizer, make, is_averaged, lambda: weights_of(called.module))
    for reported, weights in pairs:
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-6)


@everyone
@in_both_ways
@teleporting
@pytest.mark.usefixtures("process_group")
def test_fully_sharded_data_parallel(make: Make, is_averaged: bool) -> None:
    model = network()
    options = {} if make is adamw else {"symmetries": find_symmetries(model, X, groups=["scaling"])}
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    optimizer = make(model, NUM_STEPS, **options)

    def save() -> Weights:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        return {name: value.clone() for name, value in whole.items()}

    for reported, weights in report_and_save(model, optimizer, make, is_averaged, save):
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-6)


# timm


@pytest.fixture
def registered() -> Iterator[None]:
    default_registry.register(OptimInfo("teleport", LearnedTeleportOptimizer, has_eps=False))
    yield
    del default_registry._optimizers["teleport"]


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


# accelerate


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
        assert same(weights_of(fresh), weights_of(model))


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


# Lightning


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
            assert same(contents(path), seen)
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
    assert same(weights_of(plain.network), weights_of(model.network))  # Saving has changed nothing.
    steps = range(3, 41, 3) if "every_n_train_steps" in options else range(10, 41, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step={step}.ckpt" for step in steps)
    for step in steps:
        assert same(contents(tmp_path / f"step={step}.ckpt"), watch.weights[step])


@pytest.mark.parametrize("weights_only", [False, True])
def test_lightning_saves_inside_averaged(weights_only: bool, tmp_path: Path) -> None:
    """A file that a user saves there; the average stays in place until the context is left."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            iterates = weights_of(pl_module.network)
            with pl_module.optimizer.averaged():
                average = weights_of(pl_module.network)
                trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only)
                assert same(weights_of(pl_module.network), average)
            assert same(weights_of(pl_module.network), iterates)
            assert same(contents(tmp_path / "own.ckpt"), average)

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
    assert same(weights_of(alone), weights_of(model.second))


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
    assert same(contents(tmp_path / "stopped.ckpt"), weights_of(plain))


def test_without_lightning_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, AveragedEvaluation.__module__)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(AveragedEvaluation.__module__)


# The best epoch of a loop as it is.


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_epoch_is_no_worse_than_with_adamw(seed: int) -> None:
    """Noisy labels, validated after every epoch; nothing in the loop is changed but the line of the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 6, generator=generator)
    labels = target_of(inputs) + 0.5 * torch.randn(256, 1, generator=generator)

    def best(make: Callable[[nn.Module], Optimizer]) -> float:
        model, losses = network(seed), []
        optimizer = make(model)
        order = torch.Generator().manual_seed(seed)
        for _ in range(20):
            for own in torch.randperm(256, generator=order).split(16):
                optimizer.zero_grad()
                F.mse_loss(model(inputs[own]), labels[own]).backward()
                optimizer.step()
            with looking(optimizer):
                losses.append(held_out(model))
        return min(losses)

    control = best(lambda model: AdamW(model.parameters()))
    assert best(lambda model: LearnedTeleportOptimizer.for_model(model, total_steps=320)) <= control
    assert best(LearnedTeleportOptimizer.for_model) <= control


# Loops that compute with and without gradients: a trained model computes what one of the same weights does.


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: nn.Module, actions: Tensor) -> Tensor:
    return torch.distributions.Normal(model(HELD_X), 0.5).log_prob(actions)


def policy(model: nn.Module) -> list[Tensor]:
    """PPO: on the first pass the ratio to the probabilities that were recorded is 1."""
    actions = normal(64, 1, seed=1)
    with torch.no_grad():
        old = log_probabilities(model, actions)
    ratio = (log_probabilities(model, actions) - old).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    clipped = torch.minimum(ratio * HELD_Y, ratio.clamp(0.8, 1.2) * HELD_Y)
    return gradients(-clipped.mean(), model)


def contrast(outputs: Tensor) -> Tensor:
    """A loss over all pairs of a batch."""
    return (outputs - outputs.T).sub(HELD_Y - HELD_Y.T).square().mean()


def cached_gradients(model: nn.Module) -> list[Tensor]:
    """Two passes: outputs without gradients, then their gradients through one small batch after another."""
    with torch.inference_mode():
        outputs = model(HELD_X)
    outputs = outputs.clone().requires_grad_()
    contrast(outputs).backward()
    parts = [gradients((model(own) * grad).sum(), model) for own, grad in zip(HELD_X.split(10), outputs.grad.split(10))]
    both = [torch.stack(own).sum(dim=0) for own in zip(*parts)]
    torch.testing.assert_close(both, gradients(contrast(model(HELD_X)), model), rtol=1e-5, atol=1e-5)
    return both


def recomputed(model: nn.Module) -> list[Tensor]:
    """Re-entrant checkpointing of the whole model, whose first pass is one without gradients."""
    model.zero_grad()
    inputs = HELD_X.clone().requires_grad_()
    contrast(checkpoint(model, inputs, use_reentrant=True)).backward()
    found = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    torch.testing.assert_close(found, gradients(contrast(model(HELD_X)), model), rtol=1e-5, atol=1e-5)
    return found


def adversarial(model: nn.Module) -> list[Tensor]:
    """VAT: the direction that changes the outputs most, by power iteration from outputs without gradients."""
    with torch.no_grad():
        clean = model(HELD_X)
    direction = normal(64, 6, seed=2)
    for _ in range(3):
        direction = (0.1 * F.normalize(direction)).requires_grad_()
        (direction,) = torch.autograd.grad(F.mse_loss(model(HELD_X + direction), clean), direction)
    assert float(direction.norm()) > 0.0
    return gradients(F.mse_loss(model(HELD_X + F.normalize(direction)), clean), model)


def distilled(model: nn.Module) -> list[Tensor]:
    """A copy of the model, called without gradients, is the teacher."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        goal = teacher(HELD_X)
    return gradients(F.mse_loss(model(HELD_X + 0.1 * normal(64, 6)), goal), model)


def discriminated(model: nn.Module) -> list[Tensor]:
    """GAN: the fakes that the discriminator is shown, made without gradients, are those of the generator's own pass."""
    with torch.no_grad():
        fakes = model(HELD_X)
    assert torch.equal(fakes, model(HELD_X).detach())
    critic = network(3)
    return gradients(F.softplus(-critic(model(HELD_X) * HELD_X)).mean(), model)


algorithms = pytest.mark.parametrize(
    "algorithm",
    [policy, cached_gradients, recomputed, adversarial, distilled, discriminated],
    ids=lambda own: own.__name__,
)


def assert_as_a_plain_one(model: nn.Module, algorithm: Callable[[nn.Module], list[Tensor]]) -> None:
    before = weights_of(model)
    found, expected = algorithm(model), algorithm(copy_of(model))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert same(weights_of(model), before)


@everyone
@teleporting
@algorithms
def test_passes_with_and_without_gradients_agree(make: Make, algorithm: Callable[[nn.Module], list[Tensor]]) -> None:
    model = network()
    optimizer = make(model, NUM_STEPS)
    for start, end in pairwise((0, 1, 13, 26, 38)):
        train(model, optimizer, range(start, end))
        assert_as_a_plain_one(model, algorithm)


@algorithms
def test_other_weights_in_passes_without_gradients_are_noticed(
    algorithm: Callable[[nn.Module], list[Tensor]],
) -> None:
    model = network()

    def shift(amount: float) -> Callable[..., None]:
        def hook(module: nn.Sequential, *_: Any) -> None:
            if not torch.is_grad_enabled():
                module[-1].bias.data.add_(amount)
                module[-1].weight.data.mul_(2.0**amount)

        return hook

    model.register_forward_pre_hook(shift(1.0))
    model.register_forward_hook(shift(-1.0))
    with pytest.raises(AssertionError):
        assert_as_a_plain_one(model, algorithm)


@everyone
def test_clipped_policy_updates(make: Make) -> None:
    """PPO with several passes over what was recorded: the reward rises."""
    model = network()
    optimizer = make(model, NUM_STEPS)
    rewards = []
    for round_ in range(10):
        noise = 0.5 * normal(64, 1, seed=round_)
        with torch.no_grad():
            actions = model(HELD_X) + noise
            old = log_probabilities(model, actions)
        reward = -(actions - HELD_Y).square()
        rewards.append(reward.mean().item())
        advantages = (reward - reward.mean()) / reward.std()
        for number in range(4):
            ratio = (log_probabilities(model, actions) - old).exp()
            if number == 0:
                assert torch.equal(ratio, torch.ones_like(ratio))
            optimizer.zero_grad()
            (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()).backward()
            optimizer.step()
    assert rewards[-1] > rewards[0]


@everyone
def test_a_generator_does_not_collapse(make: Make) -> None:
    """Points on a circle, from fakes that are made without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    both = [
        AdamW(model.parameters(), lr=3e-3, betas=(0.5, 0.9)) if make is adamw else make(model, 200)
        for model in (generator, critic)
    ]
    angles = torch.rand(200, 64, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    for step, angle in enumerate(angles):
        noise, real = normal(64, 2, seed=step), torch.stack([angle.cos(), angle.sin()], dim=1)
        with torch.no_grad():
            fakes = generator(noise)
        both[1].zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fakes)).mean()).backward()
        both[1].step()
        both[0].zero_grad()
        made = generator(noise)
        assert torch.equal(made.detach(), fakes)
        F.softplus(-critic(made)).mean().backward()
        both[0].step()
    with torch.no_grad(), looking(both[0]):
        points = generator(normal(256, 2, seed=-1))
    assert float(points.std(dim=0).min()) > 0.2


@everyone
@teleporting
def test_a_target_that_follows(make: Make) -> None:
    """BYOL: the target is the moving average of the parameters and of nothing else."""
    model = network()
    optimizer = make(model, NUM_STEPS)
    train(model, optimizer, range(3))
    target = copy.deepcopy(model).requires_grad_(False)
    expected = weights_of(model)
    losses = []
    for step in range(NUM_STEPS - 3):
        one, other = (HELD_X + 0.1 * normal(64, 6, seed=2 * step + number) for number in range(2))
        with torch.no_grad():
            goal = target(other)
        optimizer.zero_grad()
        loss = F.mse_loss(model(one), goal) + F.mse_loss(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for own, online in zip(target.parameters(), model.parameters()):
                own.lerp_(online, 0.1)
        expected = {name: value.lerp(weights_of(model)[name], 0.1) for name, value in expected.items()}
    assert same(weights_of(target), expected)
    assert losses[-1] < losses[0]


# MeZO


def perturb(model: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(scale * torch.randn(param.shape, generator=generator))


def zeroth_order(model: nn.Module, optimizer: Optimizer, seed: int, is_exact: bool) -> None:
    """One step of MeZO: the slope along a random direction, from two passes with parameters moved in place."""
    before, losses = weights_of(model), []
    for scale in (1e-3, -2e-3):
        perturb(model, scale, seed)
        losses.append(held_out(model))
        assert losses[-1] == held_out(copy_of(model))
    perturb(model, 1e-3, seed)
    if is_exact:
        model.load_state_dict(before)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (losses[0] - losses[1]) / 2e-3 * torch.randn(param.shape, generator=generator)
    optimizer.step()


@everyone
def test_zeroth_order_gradients(make: Make) -> None:
    model = network()
    optimizer = make(model, 60)
    before = held_out(model)
    for step in range(60):
        zeroth_order(model, optimizer, step, is_exact=False)
    assert held_out(model) < before


@teleporting
def test_parameters_that_are_moved_and_put_back() -> None:
    """Bit for bit: the average has not noticed. Nearly: it begins again, since that is a write as any other."""
    averages = []
    for is_exact in (None, True, False):
        model = network()
        optimizer = open_ended(model, NUM_STEPS)
        train(model, optimizer, range(20))
        before = weights_of(model)
        if is_exact is not None:
            perturb(model, 1e-3, 0)
            perturb(model, -1e-3, 0)
            assert not same(weights_of(model), before)
        if is_exact:
            model.load_state_dict(before)
        averages.append(optimizer.averaged_parameters())
    untouched, exact, near = averages
    assert same(untouched, exact)
    now, num_changed = weights_of(model), 0
    for name, average in near.items():
        is_changed = not torch.equal(now[name], before[name])
        num_changed += is_changed
        assert torch.equal(average, now[name] if is_changed else untouched[name])
        assert not torch.equal(average, now[name]) or is_changed
    assert num_changed > 0


# Threads, several optimizers, interrupts, best weights.


@everyone
@teleporting
def test_a_thread_that_evaluates_while_another_trains(make: Make) -> None:
    def run(is_watched: bool) -> Weights:
        model = network()
        optimizer = make(model, NUM_STEPS)
        is_done, losses = threading.Event(), []

        def watch() -> None:
            while not is_done.is_set():
                losses.append(held_out(model))
                losses.append(held_out(copy.deepcopy(model)))

        thread = threading.Thread(target=watch)
        if is_watched:
            thread.start()
        try:
            for step in range(NUM_STEPS):
                train(model, optimizer, [step])
                with torch.no_grad():
                    model(HELD_X)
        finally:
            is_done.set()
            if is_watched:
                thread.join()
        assert all(torch.tensor(losses).isfinite())
        return weights_of(model)

    assert same(run(is_watched=True), run(is_watched=False))


@everyone
@teleporting
@pytest.mark.parametrize("second", [ours, open_ended, adamw])
def test_a_second_optimizer_while_the_first_is_alive(make: Make, second: Make) -> None:
    def run(is_kept: bool) -> tuple[nn.Module, Optimizer | None]:
        model = network()
        first: Optimizer | None = make(model, NUM_STEPS)
        train(model, first, range(15))
        first = first if is_kept else None
        other = second(model, NUM_STEPS)
        train(model, other, range(20))
        before = weights_of(model)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                model(HELD_X)
        for own in (first, other):
            with looking(own) if own is not None else nullcontext():
                held_out(model)
        assert same(weights_of(model), before)
        train(model, other, range(20, NUM_STEPS))
        return model, first

    (kept, first), (alone, _) = run(is_kept=True), run(is_kept=False)
    assert same(weights_of(kept), weights_of(alone))
    if isinstance(first, LearnedTeleportOptimizer):  # Others have written everything since its last step.
        assert same(first.averaged_parameters(), weights_of(kept))


class Stopped(nn.Module):
    """Is interrupted, before or after its second layer."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.network, self.place, self.is_stopping = network(), place, False

    def forward(self, inputs: Tensor) -> Tensor:
        for number, layer in enumerate(self.network):
            if number == self.place and self.is_stopping:
                raise KeyboardInterrupt
            inputs = layer(inputs)
        return inputs


@everyone
@in_both_ways
@teleporting
@pytest.mark.parametrize("place", [0, 4])
def test_an_evaluation_is_interrupted(make: Make, is_averaged: bool, place: int) -> None:
    ends = []
    for is_interrupted in (False, True):
        model = Stopped(place)
        optimizer = make(model, NUM_STEPS)
        for step in range(NUM_STEPS):
            train(model, optimizer, [step])
            if is_interrupted and step % 7 == 0:
                before = weights_of(model)
                model.is_stopping = True
                with pytest.raises(KeyboardInterrupt), looking(optimizer) if is_averaged else nullcontext():
                    held_out(model)
                model.is_stopping = False
                assert same(weights_of(model), before)
        ends.append(weights_of(model))
    assert same(*ends)


@everyone
@in_both_ways
@teleporting
@pytest.mark.parametrize("where", ["between", "inside"])
def test_the_best_weights_are_loaded_at_the_end(make: Make, is_averaged: bool, where: str) -> None:
    """What was recorded, what the model gives, and what a fresh one gives; and training may go on from there."""
    model = network()
    optimizer = make(model, 400)
    best, weights, bad, step = float("inf"), {}, 0, 0
    while bad < 4 and step < 400:
        train(model, optimizer, range(step, step + 5))
        step += 5
        with looking(optimizer) if is_averaged else nullcontext():
            loss = held_out(model)
            bad = 0 if loss < best else bad + 1
            if loss < best:
                best, weights = loss, copy.deepcopy(model.state_dict())
    assert step < 400
    with looking(optimizer) if where == "inside" else nullcontext():
        model.load_state_dict(weights)
    assert held_out(model) == held_out(loaded(weights)) == best
    with looking(optimizer):
        assert held_out(model) == best
    train(model, optimizer, [0])
    assert not same(weights_of(model), weights)


# generate()


class Operations(TorchDispatchMode):
    """Writes down every operation, also those of hooks and of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@everyone
def test_generating_costs_what_it_costs_without_the_optimizer(make: Make) -> None:
    """Counted and not timed: the same operations, no hooks, nothing written into the parameters."""

    def gpt() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                vocab_size=17, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
            )
            return transformers.GPT2LMHeadModel(config)

    model, tokens = gpt(), torch.arange(12).view(2, 6)
    optimizer = make(model, NUM_STEPS)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    plain = gpt()
    plain.load_state_dict(model.state_dict())
    versions = [param._version for param in model.parameters()]
    lists, texts = [], []
    for own in (model, plain):
        own.eval()
        with Operations() as operations:
            texts.append(own.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0))
        lists.append(operations.names)
    assert len(lists[0]) > 100
    assert lists[0] == lists[1]
    assert torch.equal(*texts)
    assert [param._version for param in model.parameters()] == versions
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
