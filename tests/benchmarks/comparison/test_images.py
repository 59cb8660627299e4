"""Data sets of torchvision, and networks for them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from benchmarks.comparison.images import image_tasks
from benchmarks.comparison.training import run_training
from teleport_optim.cli.training import learned


def test_torchvisions_data_sets_are_read(tmp_path: Path) -> None:
    """Files as torchvision keeps them, but of few images."""
    for name, letter in (("MNIST", "train"), ("MNIST", "t10k")):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        pixels, labels = bytes(range(256)) * 49, bytes(number % 10 for number in range(16))
        for kind, sizes, content in (("images-idx3", (16, 28, 28), pixels), ("labels-idx1", (16,), labels)):
            header = struct.pack(f">{1 + len(sizes)}i", 0x800 + len(sizes), *sizes)
            (folder / f"{letter}-{kind}-ubyte").write_bytes(header + content)
    tasks = image_tasks(tmp_path)
    data = tasks["mnist"].make_data()
    assert data.inputs.shape == data.test_inputs.shape == (16, 1, 28, 28)
    assert data.inputs.mean().abs() < 1e-5
    assert data.inputs[0, 0, 0, 1] - data.inputs[0, 0, 0, 0] == pytest.approx(1 / 73.9, rel=1e-2)
    assert data.targets.tolist() == [number % 10 for number in range(16)]
    run = run_training(tasks["mnist"], learned(), steps=20, seed=0)
    assert run.losses[-1] < run.losses[0]
    for name in ("fashion", "cifar"):
        with pytest.raises(FileNotFoundError, match="Pass --download"):
            tasks[name].make_data()


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("fashion", (1, 28, 28)), ("cifar", (3, 32, 32))])
def test_networks_take_the_images_of_their_data_set(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    assert image_tasks(tmp_path)[name].make_model(0)(torch.zeros(2, *shape)).shape == (2, 10)
