"""Meta-training configurations by name, and from files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from teleport_optim.meta_training.learner import Config

__all__ = ["PRESETS", "config_of_run", "read_config"]

PRESETS: dict[str, Config] = {
    "quick": Config(
        num_outer_steps=20, num_tasks=1, num_problems=2, num_pairs=4, max_horizon=60, validate_every=5, averaging=0.9
    ),
    "standard": Config(),
}
"""``quick`` only shows that everything works (about a minute on one core); ``standard`` is for a checkpoint to use."""


def read_config(name: str) -> Config:
    """The preset ``name``, or the configuration in the TOML file ``name``: flat, its keys the fields of ``Config``.

    Raises:
        ValueError: if there is no such preset or file, or the file is not such a configuration.

    Example:
        >>> read_config("standard") == Config()
        True
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise ValueError(f"no configuration {name!r}: give one of {sorted(PRESETS)} or a .toml file")
    try:
        return _config(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def config_of_run(run_dir: str | Path) -> Config:
    """The configuration with which the meta-training run in ``run_dir`` was started.

    Raises:
        ValueError: if there is no run in ``run_dir``, or its configuration cannot be read.
    """
    path = Path(run_dir) / "config.json"
    try:
        return _config(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"there is no meta-training run in {run_dir}: cannot read {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(values: Mapping[str, object]) -> Config:
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in values.items()}
    return Config().with_settings([f"{key}={text}" for key, text in texts.items()])
