"""The command line: what it prints, writes and returns, and how it fails."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from teleport_optim import cli, load_checkpoint
from teleport_optim.cli import load_model, main, parameter_share
from teleport_optim.meta_training.learner import Config, Learner, OuterStep
from teleport_optim.meta_training.presets import PRESETS, config_of_run, read_config
from teleport_optim.symmetry import SymmetrySpec, find_symmetries

MODELS = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def text():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 3))

class Unknown(nn.Module):
    def forward(self, x):
        return x

def number():
    return 3

def needs_width(width):
    return nn.Linear(width, 1)

class holder:
    model = mlp()
"""
TINY = ["num_outer_steps=3", "num_tasks=1", "num_problems=1", "num_pairs=1", "max_horizon=3", "validate_every=2"]
SETTINGS = [word for setting in [*TINY, "tasks=digits_mlp"] for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in a folder of its own, which holds the module ``zoo_of_models``."""
    (tmp_path / "zoo_of_models.py").write_text(MODELS)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestDemo:
    def test_quick(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["demo", "--quick", "--output", "pictures/demo.png"]) == 0
        assert Path("pictures/demo.png").stat().st_size > 10_000
        output = capsys.readouterr().out
        for text in ("30 steps", "AdamW default", "prior, not learned", "learned, untuned", "usual start", "rescaled"):
            assert text in output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--output", "demo.txt"], "must end in"),
            (["--checkpoint", "missing"], "no checkpoint 'missing'"),
            (["--output", "zoo_of_models.py/demo.png"], "zoo_of_models.py"),
        ],
    )
    def test_mistakes(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert_mistake(["demo", *arguments], message, capsys)

    @pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seeds", "x"], ["--rescaling", "-1"]])
    def test_values_out_of_range(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["demo", *arguments])
        assert caught.value.code == 2
        assert f"got {arguments[1]!r}" in capsys.readouterr().err


class TestInspect:
    def test_lists_and_verifies(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:mlp", "--input", "5,4"]) == 0
        output = capsys.readouterr().out
        assert "0.weight[0]^+1 0.bias[0]^+1 2.weight[1]^-1" in output
        assert "scaling: 1 sites, 97% of the parameters" in output
        assert "largest relative error of the function: " in output

    def test_tokens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:text", "--input", "2,5", "--tokens", "11"]) == 0
        assert "0:permutation" in capsys.readouterr().out

    def test_refusals_have_reasons(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:Unknown", "--input", "2,3"]) == 0
        output = capsys.readouterr().out
        assert "No symmetries found." in output
        assert "Unknown" in output
        assert "scaling: 0 sites, 0%" in output

    def test_a_symmetry_that_does_not_hold_fails(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        relu = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        wrong = find_symmetries(relu).of_group("scaling")
        monkeypatch.setattr(cli, "load_model", lambda path: nn.Sequential(relu[0], nn.GELU(), relu[2]))
        monkeypatch.setattr(cli, "find_symmetries", lambda model, example: wrong)
        assert main(["inspect", "any:thing", "--input", "5,4"]) == 1
        assert "these do not hold: 0:scaling" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["zoo_of_models"], "write the model as package.module:callable"),
            (["zoo_of_models:"], "write the model as package.module:callable"),
            (["no_such_module:mlp"], "cannot import 'no_such_module'"),
            (["broken_module:mlp"], "ZeroDivisionError"),
            (["zoo_of_models:missing"], "'zoo_of_models' has no 'missing'"),
            (["zoo_of_models:number"], "returns no torch module, but int"),
            (["zoo_of_models:needs_width"], "calling zoo_of_models:needs_width without arguments fails"),
            (["zoo_of_models:__name__"], "neither a torch module nor callable"),
            (["zoo_of_models:mlp", "--input", "5,3"], "cannot take the input"),
            (["zoo_of_models:mlp", "--tokens", "3"], "give its shape with --input"),
        ],
    )
    def test_mistakes(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert_mistake(["inspect", *arguments], message, capsys)

    def test_load_model_takes_a_module_inside_a_class(self) -> None:
        assert isinstance(load_model("zoo_of_models:holder.model"), nn.Sequential)

    def test_parameter_share(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
        assert parameter_share(model, find_symmetries(model)) == 1.0
        assert parameter_share(model, SymmetrySpec()) == 0.0
        grouped = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2, bias=False))
        (first, *_) = find_symmetries(grouped).of_group("scaling")
        assert parameter_share(grouped, SymmetrySpec((first,))) == pytest.approx((8 + 4) / 24)


class TestMetaTrain:
    def test_run_writes_a_checkpoint_with_its_card(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["meta-train", *SETTINGS, "--run-dir", "run", "--output", "mine.safetensors"]) == 0
        assert "step 2: objective" in capsys.readouterr().out
        assert load_checkpoint("mine.safetensors").hidden_size == Config().hidden_size
        assert json.loads(Path("mine.json").read_text())["meta_training"]["num_outer_steps_taken"] == 3

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted_run_goes_on_where_it_was(
        self, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(["meta-train", *SETTINGS, "--run-dir", "whole"]) == 0
        run = Learner.run

        def interrupted(learner: Learner) -> Iterator[OuterStep]:
            for step in run(learner):
                yield step
                os.kill(os.getpid(), number)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(Learner, "run", interrupted)
        assert main(["meta-train", *SETTINGS, "--run-dir", "parts"]) == 130
        assert signal.getsignal(signal.SIGTERM) is before
        output = capsys.readouterr().out
        assert "Interrupted after 1 of 3 steps. To go on: teleport-optim meta-train --resume parts" in output
        monkeypatch.setattr(Learner, "run", run)
        assert main(["meta-train", "--resume", "parts"]) == 0
        whole, parts = (load_checkpoint(f"{name}/checkpoint.safetensors") for name in ("whole", "parts"))
        for name, weight in whole.state_dict().items():
            assert torch.equal(parts.state_dict()[name], weight)

    def test_toml_file(self) -> None:
        Path("mine.toml").write_text('sigma = 0.1\nnum_pairs = 2\ntasks = ["digits_mlp", "digits_cnn"]\n')
        expected = Config(sigma=0.1, num_pairs=2, tasks=("digits_mlp", "digits_cnn"))
        assert read_config("mine.toml") == expected

    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_configuration_of_a_run_is_that_it_was_started_with(self, name: str) -> None:
        Learner(PRESETS[name], "run")
        assert config_of_run("run") == PRESETS[name]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config", "missing"], "no configuration 'missing'"),
            (["--config", "missing.toml"], "cannot read missing.toml"),
            (["--config", "wrong.toml"], "unknown setting"),
            (["--set", "sigma=fast"], "cannot read 'fast'"),
            (["--set", "sigma=-1"], "sigma must be positive"),
            (["--resume", "missing"], "there is no meta-training run in missing"),
            (["--resume", "any", "--set", "sigma=1"], "leave out --config, --set and --run-dir"),
            (["--output", "weights.pt"], "ends in .safetensors"),
            (["--run-dir", "taken"], "taken holds a run"),
        ],
    )
    def test_mistakes(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("wrong.toml").write_text("speed = 3\n")
        Path("taken").mkdir()
        Path("taken/state.pt").write_text("")
        assert_mistake(["meta-train", *arguments], message, capsys)


@pytest.mark.parametrize("command", [["demo"], ["inspect", "zoo_of_models:mlp"], ["meta-train"]])
def test_missing_extra_is_named(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_mistake(command, "pip install 'teleport-optim[cli]'", capsys)


@pytest.mark.parametrize("command", [[], ["demo"], ["inspect"], ["meta-train"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: teleport-optim" in capsys.readouterr().out


def assert_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with code 2 and one line that holds ``message``, and prints no traceback."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("teleport-optim: error: ")
    assert error.count("\n") == 1
    assert message in error
