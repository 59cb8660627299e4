"""What breaks with optimizers in training libraries: resuming, accumulating, clipping, scaling, schedules, wrapped models.

torch's AdamW is the control: it passes the same tests wherever they make sense for it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.meta_training.tasks.data import digits
from teleport_optim.optim.schedule import is_control_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),  # Lightning, of its own code
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # on machines with more cores
]

Make = Callable[[nn.Module, int], Optimizer]


def ours(model: nn.Module, num_steps: int) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=num_steps)


def adamw(model: nn.Module, num_steps: int) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


everyone = pytest.mark.parametrize("make", [ours, adamw])

X, Y = (values[:112] for values in digits("demo"))
BATCHES = list(zip(X.split(16), Y.split(16)))
"""Seven, so that the end of an epoch is none of the steps at which the learned optimizer does more than usual."""


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def teleport_size(optimizer: Optimizer) -> float:
    return optimizer.teleport_size if isinstance(optimizer, LearnedTeleportOptimizer) else 0.0


def assert_teleports(make: Make, sizes: list[float]) -> None:
    """The learned optimizer teleports in its first step and in every fortieth from there, AdamW never."""
    assert [step for step, size in enumerate(sizes) if size > 0] == (
        [step for step in range(len(sizes)) if is_control_step(step)] if make is ours else []
    )


def warned_of_a_schedule(make: Make) -> AbstractContextManager[Any]:
    """The learned optimizer, which has a schedule of its own, warns of another one on top."""
    return pytest.warns(UserWarning, match="^lr has changed from") if make is ours else nullcontext()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def assert_same_values(first: Any, second: Any) -> None:
    """Two nested containers hold the same."""
    (one, one_tree), (other, other_tree) = tree_flatten(first), tree_flatten(second)
    assert one_tree == other_tree
    for value, other_value in zip(one, other, strict=True):
        assert torch.equal(value, other_value) if isinstance(value, Tensor) else value == other_value


def reference(make: Make, epochs: int, *, accumulation: int = 1, clip: float | None = None) -> nn.Module:
    """The network after the loop that a library is to have run: the last step of an epoch may have fewer batches."""
    model = network()
    optimizer = make(model, epochs * -(-len(BATCHES) // accumulation))
    for _ in range(epochs):
        for index, (inputs, labels) in enumerate(BATCHES, start=1):
            (F.cross_entropy(model(inputs), labels) / accumulation).backward()
            if index % accumulation == 0 or index == len(BATCHES):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


# Lightning


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


# transformers


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


# accelerate


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated_epoch(
    accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any, data: Any, clip: float | None = None
) -> tuple[list[float], list[float]]:
    """The losses of the batches, and the teleports of the steps."""
    losses, sizes = [], []
    for inputs, labels in data:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if accelerator.sync_gradients:
            sizes.append(teleport_size(optimizer.optimizer))
    return losses, sizes


@everyone
@pytest.mark.parametrize("is_prepared_together", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"accumulation": 3, "clip": 0.1}])
def test_accelerate_runs_the_plain_loop(make: Make, is_prepared_together: bool, options: dict[str, Any]) -> None:
    accumulation = options.get("accumulation", 1)
    num_steps = 3 * -(-len(BATCHES) // accumulation)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = network()
    if is_prepared_together:
        model, optimizer, data = accelerator.prepare(model, make(model, num_steps), loader())
    else:
        model, data = accelerator.prepare(model, loader())
        optimizer = accelerator.prepare(make(model, num_steps))
    sizes = []
    for _ in range(3):
        sizes += accelerated_epoch(accelerator, model, optimizer, data, options.get("clip"))[1]
    assert len(sizes) == num_steps
    assert {optimizer.state[param]["step"].item() for param in model.parameters()} == {float(num_steps)}
    assert_same(model, reference(make, 3, **options))
    assert_teleports(make, sizes)


@everyone
def test_accelerate_resumes_bit_for_bit(make: Make, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer, data = accelerator.prepare(model, make(model, 21), loader())
    accelerated_epoch(accelerator, model, optimizer, data)
    accelerator.save_state(str(tmp_path))
    losses = [accelerated_epoch(accelerator, model, optimizer, data) for _ in range(2)]

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    resumed = network(seed=9)
    resumed, optimizer, data = accelerator.prepare(resumed, make(resumed, 21), loader())
    accelerator.load_state(str(tmp_path))
    assert [accelerated_epoch(accelerator, resumed, optimizer, data) for _ in range(2)] == losses
    assert_same(resumed, model)


def test_accelerate_mixed_precision() -> None:
    """Accelerate replaces the forward method of the model by one that casts."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    model, optimizer, data = accelerator.prepare(model, ours(model, 21), loader())
    losses, sizes = zip(*(accelerated_epoch(accelerator, model, optimizer, data) for _ in range(3)))
    assert sum(losses[-1]) < sum(losses[0])
    assert_teleports(ours, [size for epoch in sizes for size in epoch])
    assert len(optimizer.optimizer.spec) == 2


# timm


@pytest.fixture
def registered() -> Iterator[None]:
    default_registry.register(OptimInfo("teleport", LearnedTeleportOptimizer, has_eps=False))
    yield
    del default_registry._optimizers["teleport"]


def resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_resnet", in_chans=1, num_classes=10, stem_type="")


def train_on_images(model: nn.Module, optimizer: Optimizer, steps: int) -> tuple[list[float], list[float]]:
    losses, sizes = [], []
    for step in range(steps):
        inputs, labels = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.view(-1, 1, 8, 8)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sizes.append(teleport_size(optimizer))
    return losses, sizes


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", ["teleport", "adamw"])
def test_timm_factory(make: str) -> None:
    model = resnet()
    options = {"model": model, "total_steps": 21} if make == "teleport" else {"lr": 1e-3}
    optimizer = create_optimizer_v2(model, make, weight_decay=0.1, eps=1e-8, **options)
    undecayed, decayed = optimizer.param_groups
    assert (undecayed["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert {param.ndim for param in undecayed["params"]} == {1}
    losses, sizes = train_on_images(model, optimizer, 21)
    assert sum(losses[-7:]) < sum(losses[:7])
    assert_teleports(ours if make == "teleport" else adamw, sizes)


@pytest.mark.usefixtures("registered")
def test_timm_factory_keeps_the_learned_decay_of_parameters() -> None:
    """With a model timm sets every group's decay, to 0 if it is given none."""
    model, other = resnet(), resnet()
    made = create_optimizer_v2(model.parameters(), "teleport", weight_decay=None, model=model, total_steps=21)
    assert [group["weight_decay"] for group in made.param_groups] == [None]
    given = LearnedTeleportOptimizer.for_model(other, total_steps=21)
    assert train_on_images(model, made, 3) == train_on_images(other, given, 3)
    assert_same(model, other)


@everyone
@pytest.mark.usefixtures("registered")
def test_timm_layer_decay(make: Make) -> None:
    model = resnet()
    name, options = ("teleport", {"model": model, "total_steps": 21}) if make is ours else ("adamw", {})
    optimizer = create_optimizer_v2(model, name, lr=1.0, layer_decay=0.5, **options)
    CosineLRScheduler(optimizer, t_initial=21, t_in_epochs=False).step_update(0)
    assert sorted({group["lr"] for group in optimizer.param_groups})[-2:] == [0.5, 1.0]
    first, last = (copy.deepcopy(param) for param in (model.conv1.weight, model.fc.weight))
    train_on_images(model, optimizer, 1)
    assert not torch.equal(model.conv1.weight, first)
    assert not torch.equal(model.fc.weight, last)


@everyone
def test_timm_schedule(make: Make) -> None:
    model = network()
    optimizer = make(model, 21)
    first = optimizer.defaults["lr"]
    schedule = CosineLRScheduler(optimizer, t_initial=12, warmup_t=2, t_in_epochs=False, warmup_prefix=True)
    rates = []
    for step in range(21):
        before = network()
        before.load_state_dict(model.state_dict())
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"] / first)
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        with warned_of_a_schedule(make) if step == 1 else nullcontext():  # where it changes first
            optimizer.step()
        moved = not torch.equal(before[0].weight, model[0].weight)
        assert moved == (rates[-1] > 0)
    assert rates[:4] == pytest.approx([0.0, 0.5, 1.0, 0.983], abs=1e-3)
    assert rates[-1] == 0.0


# torch's own


@everyone
@pytest.mark.parametrize("steps", [0, 7, 20])
def test_the_gradient_scaler_skips_a_step_of_infinite_gradients(make: Make, steps: int) -> None:
    """Nothing changes then, and the next step is what it would have been."""
    ends = []
    for is_disturbed in (False, True):
        model = network()
        optimizer = make(model, 21)
        for step in range(21):
            if step == steps and is_disturbed:
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
                before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                optimizer.zero_grad()
                scaler.scale(1e4 * F.cross_entropy(model(X), Y)).backward()
                assert not all(param.grad.isfinite().all() for param in model.parameters() if param.grad is not None)
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 2.0**126
                assert_same_values((model.state_dict(), optimizer.state_dict()), before)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
        ends.append(model)
    assert_same(*ends)


@everyone
def test_distributed_data_parallel_runs_the_plain_loop(make: Make) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = make(model, 21)
        sizes = []
        for inputs, labels in BATCHES * 3:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs), labels).backward()
            optimizer.step()
            sizes.append(teleport_size(optimizer))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(model, reference(make, 3))
    assert_teleports(make, sizes)


def compile_whole(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    """What is called, and what the optimizer is told of."""
    return torch.compile(model, backend=backend), model  # type: ignore[return-value]


def compile_in_place(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    model.compile(backend=backend)
    return model, model


def compile_and_hand_over(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    compiled: Any = torch.compile(model, backend=backend)
    return compiled, compiled


@pytest.mark.parametrize("compiling", [compile_whole, compile_in_place, compile_and_hand_over])
def test_a_compiled_model_teleports(compiling: Callable[..., tuple[nn.Module, nn.Module]]) -> None:
    plain = reference(ours, 2)
    model = network()
    called, known = compiling(model)
    optimizer = ours(known, 14)
    sizes = []
    for inputs, labels in BATCHES * 2:
        optimizer.zero_grad()
        F.cross_entropy(called(inputs), labels).backward()
        optimizer.step()
        sizes.append(optimizer.teleport_size)
    assert_teleports(ours, sizes)
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiling", [compile_whole, compile_in_place, compile_and_hand_over])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_compiled_model_is_compiled_whole(
    compiling: Callable[..., tuple[nn.Module, nn.Module]], is_waiting: bool
) -> None:
    """Whatever waits for the first call of the model must not break its graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    called, known = compiling(network(), backend)
    optimizer = LearnedTeleportOptimizer.for_model(
        known, total_steps=21, example_inputs=None if is_waiting else BATCHES[0][0]
    )
    for inputs, labels in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(called(inputs), labels).backward()
        optimizer.step()
    assert max(graphs, default=0) == 5


def test_waiting_leaves_nothing_behind_in_torch() -> None:
    """A hook on all modules would, and torch.compile warns of one for as long."""
    before = dict(torch_module._global_forward_hooks_with_kwargs)
    model = network()
    optimizer = ours(model, 21)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert dict(torch_module._global_forward_hooks_with_kwargs) == before
