"""The configuration of a meta-training run: its keys, its presets, and reading it from files and settings."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from teleport_optim.meta_training.tasks import TASKS, find_task
from teleport_optim.optim.shapes import BLOCK_ROWS

__all__ = ["ESTIMATOR_NAMES", "PRESETS", "Config", "log_uniform_horizon", "parse_config", "read_config"]

ESTIMATOR_NAMES = ("es", "pes", "pes+tbptt", "tbptt", "tbptt_first_order")
_OBJECTIVES = ("normalised", "plain")

_PLACES = ("run_dir", "device")
"""Where a run is and on what it runs: keys that may differ when it is resumed."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a meta-training run; two runs with equal configurations agree bit for bit on CPU.

    Raises:
        ValueError: if a value is out of its range, or a task, estimator or objective is unknown; the nearest valid name is given.

    Example:
        >>> Config(estimator="pse")
        Traceback (most recent call last):
        ...
        ValueError: unknown estimator 'pse': did you mean 'pes'? There are es, pes, pes+tbptt, tbptt, tbptt_first_order
    """

    run_dir: str = ""
    """Folder of the run."""
    device: str = "cpu"
    """Device on which networks are trained; minibatches and perturbations are always drawn on the CPU."""
    seed: int = 0
    estimator: str = "es"
    """One of ``ESTIMATOR_NAMES``."""
    objective: str = "normalised"
    """``"normalised"``: log of relative losses, mostly of the last tenth of a run; ``"plain"``: sum of all losses."""
    tasks: tuple[str, ...] = tuple(TASKS)
    num_outer_steps: int = 800
    num_tasks: int = 4
    """Problem batches per outer step, each of one family and architecture."""
    num_problems: int = 2
    """Problems in a batch, which differ in data and initial values."""
    num_pairs: int = 12
    """Antithetic perturbation pairs per batch."""
    min_horizon: int = 40
    max_horizon: int = 400
    curriculum: float = 0.5
    """Share of the outer steps over which the longest horizon grows, geometrically, from ``min_horizon``."""
    truncation: int = 20
    """Steps of a training run between two meta-gradients; ``es`` always takes the whole run."""
    mix: float = 0.5
    """Weight of the part of truncated backpropagation in ``pes+tbptt``."""
    sigma: float = 0.02
    """Standard deviation of the perturbations."""
    learning_rate: float = 4e-3
    equal_tasks: bool = False
    """Give all problem batches of an outer step the same weight in the meta-gradient, whatever their spread of meta-losses."""
    decay_to: float = 0.1
    """Share of the learning rate at the end, reached along a cosine; 1 keeps it constant."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of a meta-gradient; 0 for none."""
    averaging: float = 0.98
    """Decay of the average of the weights, which is what is validated and kept."""
    hidden_size: int = 12
    block_rows: int = BLOCK_ROWS
    """Number of rows of a matrix that the steps which the controller steers make orthogonal to each other."""
    frozen: tuple[str, ...] = ()
    """Patterns, as of file names, of meta-parameters that keep their initial values, such as ``*.balance``."""
    validate_every: int = 80
    """Outer steps between validations, the best of which is kept; 0 for none, and the last average is kept."""
    num_validation: int = 2
    """Problem batches of every task in a validation."""

    def __post_init__(self) -> None:
        positive = (
            "num_outer_steps",
            "num_tasks",
            "num_problems",
            "num_pairs",
            "min_horizon",
            "truncation",
            "hidden_size",
            "block_rows",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sigma", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "validate_every", "num_validation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("curriculum", "mix", "decay_to"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must lie in [0, 1), got {self.averaging}")
        if self.max_horizon < self.min_horizon:
            raise ValueError(f"max_horizon must be at least min_horizon, got {self.max_horizon} < {self.min_horizon}")
        choices = {"estimator": ESTIMATOR_NAMES, "objective": _OBJECTIVES}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: {_nearest(getattr(self, name), valid)}")
        if not self.tasks:
            raise ValueError("tasks must name at least one task")
        for task in self.tasks:
            find_task(task)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that two runs must share to be one, as plain JSON: all but where they are."""
        values = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in values.items() if key not in _PLACES}

    def longest_horizon(self, outer_step: int) -> int:
        """The longest horizon of a training run that begins at ``outer_step``."""
        progress = min(1.0, outer_step / max(self.curriculum * self.num_outer_steps, 1.0))
        growth: float = (self.max_horizon / self.min_horizon) ** progress
        return round(self.min_horizon * growth)

    def with_settings(self, settings: Iterable[str]) -> Config:
        """This configuration with ``key=value`` settings applied; the entries of a tuple are separated by commas.

        Raises:
            ValueError: for an unknown key or a value that cannot be read.

        Example:
            >>> Config().with_settings(["sigma=0.1", "tasks=digits_mlp,digits_cnn"]).tasks
            ('digits_mlp', 'digits_cnn')
        """
        values: dict[str, Any] = {}
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise ValueError(f"cannot read the setting {setting!r}: write key=value")
            key = _known_key(key)
            values[key] = _read(key, text)
        return replace(self, **values)


def log_uniform_horizon(shortest: int, longest: int, quantile: float) -> int:
    """Quantile of the horizons of training runs, whose logarithms are uniform between those of the two bounds.

    Example:
        >>> [log_uniform_horizon(10, 1000, quantile) for quantile in (0.0, 0.5, 1.0)]
        [10, 100, 1000]
    """
    low, high = math.log(shortest), math.log(longest)
    return round(math.exp(low + (high - low) * quantile))


_KINDS: dict[str, type] = {entry.name: type(entry.default) for entry in fields(Config)}


def _known_key(key: str) -> str:
    if key not in _KINDS:
        raise ValueError(f"unknown key {key!r}: {_nearest(key, tuple(sorted(_KINDS)))}")
    return key


def _read(key: str, text: str) -> Any:
    kind = _KINDS[key]
    try:
        if kind is tuple:
            return tuple(entry for entry in text.split(",") if entry)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise ValueError(f"cannot read {text!r} as the {kind.__name__} that {key} is") from error


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    return f"{hint}There are {', '.join(valid)}"


PRESETS: dict[str, Config] = {
    "quick": Config(
        tasks=("digits_mlp", "digits_autoencoder", "teacher_regression", "teacher_classification", "tabular_mlp"),
        num_outer_steps=250,
        num_pairs=8,
        max_horizon=150,
        learning_rate=6e-3,
        averaging=0.95,
        validate_every=25,
        num_validation=3,
    ),
    "standard": Config(),
    "default": Config(
        num_outer_steps=40,
        num_tasks=7,
        min_horizon=120,
        max_horizon=320,
        curriculum=0.0,
        sigma=0.05,
        learning_rate=5e-3,
        averaging=0.96,
        equal_tasks=True,
        frozen=("input_weight", "hidden_weight", "bias", "*.rate", "*.momentum", "*.decay"),
        validate_every=0,
        num_validation=3,
    ),
    "large": Config(
        num_outer_steps=10_000,
        num_tasks=64,
        num_pairs=32,
        min_horizon=50,
        max_horizon=2000,
        sigma=0.01,
        learning_rate=2e-3,
        averaging=0.995,
        validate_every=200,
        num_validation=8,
    ),
}
"""``quick``: perceptrons only, minutes on one core; ``standard``: an hour or two; ``default``: that of the default checkpoint, a
quarter of an hour on one core, where only the readout of teleports is learned; ``large``: for many machines."""


def read_config(name: str) -> Config:
    """The preset ``name``, or the configuration in the TOML file ``name``: flat, its keys the fields of ``Config``.

    Raises:
        ValueError: if there is no such preset or file, or the file is not such a configuration.

    Example:
        >>> read_config("standard") == PRESETS["standard"]
        True
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise ValueError(f"no configuration {name!r}: {_nearest(name, tuple(PRESETS))}, or a .toml file")
    try:
        return parse_config(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def parse_config(values: Mapping[str, object]) -> Config:
    """The configuration with these values, as TOML and JSON hold them; keys that are missing have their defaults.

    Raises:
        ValueError: for an unknown key or a value that cannot be read.
    """
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in values.items()}
    return Config().with_settings(f"{key}={text}" for key, text in texts.items())
