"""Arguments of commands: numbers and shapes, and objects that are named by where they are imported from."""

from __future__ import annotations

import argparse
import importlib
import math
import operator
import os
import sys
from pathlib import Path

from torch import nn

from teleport_optim.cli.errors import CommandError, one_line

__all__ = [
    "check_picture_name",
    "import_from_here",
    "load_model",
    "load_object",
    "not_negative",
    "positive",
    "shape",
]

_PICTURES = (".pdf", ".png", ".svg")


def positive(text: str) -> int:
    """A whole number of at least 1, from an argument."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0, from an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """A shape, from an argument.

    Example:
        >>> shape("2,3,224,224")
        (2, 3, 224, 224)
    """
    return tuple(positive(size) for size in text.split(","))


def check_picture_name(path: Path) -> None:
    """Refuse a picture of a format that is not drawn.

    Raises:
        CommandError: if the name ends in none of the known formats.
    """
    if path.suffix not in _PICTURES:
        raise CommandError(f"the picture's name must end in {' or '.join(_PICTURES)}, got {str(path)!r}")


def import_from_here() -> None:
    """Make the modules in the current folder importable, as they are with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_object(path: str) -> object:
    """Import what is at ``module:name``; the current directory is importable, as it is with ``python -m``.

    Raises:
        CommandError: saying which part of the path is wrong.

    Example:
        >>> load_object("math:pi") > 3
        True
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise CommandError(f"write it as package.module:name, got {path!r}")
    import_from_here()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(f"cannot import {module_name!r}: {one_line(error)}") from error
    try:
        found: object = operator.attrgetter(name)(module)
    except AttributeError as error:
        raise CommandError(f"{module_name!r} has no {name!r}") from error
    return found


def load_model(path: str) -> nn.Module:
    """Import the model at ``module:name``: a module, or a function without arguments that returns one.

    Raises:
        CommandError: saying which part of the path is wrong.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    found = load_object(path)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{path} is neither a torch module nor callable, but {type(found).__name__}")
    try:
        model = found()
    except Exception as error:
        raise CommandError(f"calling {path} without arguments fails: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{path} returns no torch module, but {type(model).__name__}")
    return model
