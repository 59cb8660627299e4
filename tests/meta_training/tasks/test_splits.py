"""Splits: training, validation and test have nothing in common."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from teleport_optim.meta_training.tasks import InnerProblem, networks
from teleport_optim.meta_training.tasks import data as data_module
from teleport_optim.meta_training.tasks.data import ALPHABET, digits, paragraphs, table, text
from teleport_optim.meta_training.tasks.splits import (
    CHANNELS,
    DIGIT_ROWS,
    SEQUENCE_WIDTHS,
    SPLITS,
    TABLES,
    WIDTHS,
    text_split,
)
from teleport_optim.rng import generator_for
from teleport_optim.symmetry import SymmetrySpec
from tests.helpers.problems import FUNCTION_TASKS, HORIZONS, NETWORK_TASKS, TASKS, draw_problem, each_split


@pytest.fixture
def _without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that are drawn without a look at their symmetries, which comes after the architecture and takes the time."""
    monkeypatch.setattr(networks, "find_symmetries", lambda *args, **options: SymmetrySpec())


@pytest.mark.usefixtures("_without_search")
@pytest.mark.parametrize("name", NETWORK_TASKS)
def test_splits_have_no_architecture_in_common(name: str) -> None:
    architectures = [{draw_problem(name, split, seed, 1).architecture for seed in range(60)} for split in SPLITS]
    assert all(len(some) > 10 for some in architectures)
    assert not any(first & second for first, second in itertools.combinations(architectures, 2))


@pytest.mark.parametrize("sizes", [WIDTHS, CHANNELS, SEQUENCE_WIDTHS, TABLES])
def test_sizes_and_tables_belong_to_one_split(sizes: dict[str, tuple[object, ...]]) -> None:
    assert tuple(sizes) == SPLITS
    assert sum(map(len, sizes.values())) == len(set(itertools.chain(*sizes.values())))


@pytest.mark.usefixtures("_without_search")
@pytest.mark.parametrize("name", NETWORK_TASKS)
def test_equal_architectures_have_equal_shapes(name: str) -> None:
    shapes: dict[str, list[torch.Size]] = {}
    for seed in range(40):
        problem = draw_problem(name, "train", seed, 1)
        own = [param.shape for param in problem.params.values()]
        assert shapes.setdefault(problem.architecture, own) == own


@pytest.mark.parametrize("name", ["teacher_regression", "teacher_classification", *FUNCTION_TASKS])
def test_procedural_data_differ_between_splits_even_from_one_seed(name: str) -> None:
    problems = [TASKS[name].sample(8, HORIZONS, split, generator_for(0)) for split in SPLITS]
    for first, second in itertools.combinations(problems, 2):
        if name in FUNCTION_TASKS:
            assert not torch.isin(first.params["x"], second.params["x"]).any()
            first_data, second_data = (problem.sample_batch(generator_for(0))[0] for problem in (first, second))
            is_drawn = (first_data != first_data[0]).any(dim=0) & (first_data != 0).any(dim=0)
            assert is_drawn.any() == (not name.endswith("_fixed"))
            assert not torch.isin(first_data[:, is_drawn], second_data[:, is_drawn]).any()
        else:
            assert first.sample_batch(generator_for(0))[0].shape != second.sample_batch(generator_for(0))[0].shape


def without_noise(name: str, split: str) -> InnerProblem:
    problems = (draw_problem(name, split, seed, 3) for seed in range(50))
    return next(problem for problem in problems if "noise=0.0" in problem.description)


def are_rows_of(rows: Tensor, source: Tensor) -> Tensor:
    """Which of ``rows`` occur in ``source``."""
    return (rows.flatten(0, 1)[:, None] == source[None]).all(dim=-1).any(dim=-1)


@each_split
@pytest.mark.parametrize("name", ["digits_mlp", "digits_autoencoder", "digits_cnn", "digits_batchnorm_cnn"])
def test_tasks_on_digits_use_the_rows_of_their_split(name: str, split: str) -> None:
    inputs = without_noise(name, split).sample_batch(generator_for(0))[0].flatten(2)
    assert are_rows_of(inputs, digits(split)[0]).all()
    for other in set(DIGIT_ROWS) - {split}:
        assert not are_rows_of(inputs, digits(other)[0]).any()


def test_splits_of_the_digits_are_disjoint() -> None:
    bounds = sorted(DIGIT_ROWS.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert sum(len(digits(split)[0]) for split in DIGIT_ROWS) == 1797
    with pytest.raises(ValueError, match="no split 'holdout'"):
        digits("holdout")


@each_split
def test_tables_are_those_of_the_split(split: str) -> None:
    """Every value of an input occurs in one of the split's tables, and hardly any in those of the others."""
    inputs = without_noise("tabular_mlp", split).sample_batch(generator_for(0))[0]
    for other in SPLITS:
        values = torch.cat([table(name).columns.flatten() for name in TABLES[other]])
        share = torch.isin(inputs, values).double().mean()
        assert share == 1.0 if other == split else share < 0.05


def test_tables_are_standardised_and_some_are_held_out() -> None:
    for name in itertools.chain(*TABLES.values()):
        columns = table(name).columns
        torch.testing.assert_close(columns.mean(dim=0), torch.zeros(columns.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(columns.std(dim=0), torch.ones(columns.shape[1]))
    assert TABLES["test"] == ("breast_cancer", "diabetes")
    assert [table(name).num_classes for name in ("wine", "iris", "breast_cancer", "diabetes")] == [3, 3, 2, 0]


def test_paragraphs_belong_to_one_split() -> None:
    groups = [set(paragraphs(split)) for split in SPLITS]
    assert not any(first & second for first, second in itertools.combinations(groups, 2))
    assert all(len(text(split)) > 20000 for split in SPLITS)
    assert text("train").max() < len(ALPHABET)
    assert {text_split(title) for title in map(str, range(50))} == set(SPLITS)


@each_split
@pytest.mark.parametrize("name", ["char_transformer", "char_recurrent"])
def test_texts_are_those_of_the_split_and_targets_are_what_follows(name: str, split: str) -> None:
    inputs, targets = draw_problem(name, split, 0).sample_batch(generator_for(0))
    assert torch.equal(inputs[..., 1:], targets[..., :-1])
    windows = ["".join(ALPHABET[index] for index in window) for window in inputs.flatten(0, 1).tolist()]
    for other in SPLITS:
        source = "".join(ALPHABET[index] for index in text(other).tolist())
        share = sum(window in source for window in windows) / len(windows)
        assert share == 1.0 if other == split else share < 0.2


def test_missing_data_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pydoc_data.topics", "sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="leave out the tasks whose names start with 'char_'"):
        paragraphs.__wrapped__("train")
    with pytest.raises(ImportError, match="pip install"):
        table.__wrapped__("iris")
    with pytest.raises(ImportError, match="pip install"):
        data_module._all_digits.__wrapped__()
