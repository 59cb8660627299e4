"""The command line: what it prints, writes and returns, and how it fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from teleport_optim import MetaOptimizer, save_checkpoint
from teleport_optim.cli import inspect
from teleport_optim.cli.arguments import load_model
from teleport_optim.cli.main import main
from teleport_optim.controller.checkpoints import list_checkpoints, read_card
from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from tests.helpers.mistakes import assert_mistake

MODELS = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def text():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 3))

class Unknown(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))

    def forward(self, x):
        return self[1](self[0](x).sort(1).values)

def number():
    return 3

def needs_width(width):
    return nn.Linear(width, 1)

class holder:
    model = mlp()
"""


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
        assert_mistake(main, ["demo", *arguments], message, capsys)

    @pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seeds", "x"], ["--rescaling", "-1"]])
    def test_values_out_of_range(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["demo", *arguments])
        assert caught.value.code == 2
        assert f"got {arguments[1]!r}" in capsys.readouterr().err


class TestInspect:
    def test_lists_draws_and_verifies(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:mlp", "--input", "5,4"]) == 0
        assert Path("channels.svg").read_text().startswith("<?xml")
        output = capsys.readouterr().out
        assert "0.weight[0]^+1 0.bias[0]^+1 2.weight[1]^-1" in output
        assert "scaling: 1 sites, 96.6% of the parameters" in output
        assert "largest relative error of the function: " in output

    def test_tokens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:text", "--input", "2,5", "--tokens", "11"]) == 0
        assert "0:permutation" in capsys.readouterr().out

    def test_refusals_have_reasons(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "zoo_of_models:Unknown", "--input", "2,3"]) == 0
        output = capsys.readouterr().out
        assert "No symmetries found." in output
        assert "is not an operation whose symmetries are known" in output
        assert "scaling: 0 sites, 0.0%" in output
        assert not Path("channels.svg").exists()

    def test_a_long_table_is_cut_unless_all_is_asked_for(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspect, "_MAX_ROWS", 1)
        arguments = ["inspect", "zoo_of_models:mlp", "--input", "5,4", "--no-verify"]
        assert main([*arguments, "--json", "spec.json"]) == 0
        output = capsys.readouterr().out
        assert "and 1 more sites: --all lists everything" in output
        assert "largest relative error" not in output
        assert len(SymmetrySpec.from_json(Path("spec.json").read_text())) == 2
        assert main([*arguments, "--all"]) == 0
        assert "0:scaling" in capsys.readouterr().out

    def test_a_symmetry_that_does_not_hold_fails(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        relu = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        wrong = find_symmetries(relu, torch.randn(5, 4)).of_group("scaling")
        monkeypatch.setattr(inspect, "load_model", lambda path: nn.Sequential(relu[0], nn.GELU(), relu[2]))
        monkeypatch.setattr(inspect, "find_symmetries", lambda model, example: wrong)
        assert main(["inspect", "any:thing", "--input", "5,4"]) == 1
        assert "these do not hold: 0:scaling" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["zoo_of_models"], "write it as package.module:name"),
            (["zoo_of_models:"], "write it as package.module:name"),
            (["no_such_module:mlp"], "cannot import 'no_such_module'"),
            (["broken_module:mlp"], "ZeroDivisionError"),
            (["zoo_of_models:missing"], "'zoo_of_models' has no 'missing'"),
            (["zoo_of_models:number"], "returns no torch module, but int"),
            (["zoo_of_models:needs_width"], "calling zoo_of_models:needs_width without arguments fails"),
            (["zoo_of_models:__name__"], "neither a torch module nor callable"),
            (["zoo_of_models:mlp", "--input", "5,3"], "cannot take example_inputs"),
            (["zoo_of_models:mlp", "--picture", "a.gif"], "must end in"),
            (["zoo_of_models:mlp", "--picture", "no/such/folder/a.svg"], "no/such/folder"),
        ],
    )
    def test_mistakes(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        given = arguments if "--input" in arguments else [*arguments, "--input", "5,4"]
        assert_mistake(main, ["inspect", *given], message, capsys)

    def test_load_model_takes_a_module_inside_a_class(self) -> None:
        assert isinstance(load_model("zoo_of_models:holder.model"), nn.Sequential)


class TestCheckpoints:
    def test_all_that_are_shipped_verify(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["checkpoints"]) == 0
        output = capsys.readouterr().out
        for name, path in list_checkpoints().items():
            card = read_card(path)
            row = next(line for line in output.splitlines() if f" {name} " in line)
            estimator = card["meta_training"].get("estimator", "-")
            values = [str(card["num_parameters"]), estimator, str(card["meta_training_minutes"]), card["sha256"][:12]]
            assert row.replace("│", " ").split() == [name, *values]

    def test_those_that_are_given(self, capsys: pytest.CaptureFixture[str]) -> None:
        save_checkpoint(MetaOptimizer(3), "mine.safetensors")
        assert main(["checkpoints", "mine.safetensors", "light"]) == 0
        output = capsys.readouterr().out
        assert "mine.safetensors" in output
        assert "light" in output
        assert "default" not in output

    @pytest.mark.parametrize(
        "card",
        [
            {"meta_training": {"estimator": "\x1b[31m[bold]"}, "meta_training_minutes": float("nan")},
            {"meta_training": {"estimator": "\ud800"}, "meta_training_minutes": 10**4000},
            {"meta_training": {"estimator": ["es"]}, "meta_training_minutes": -1},
            {"meta_training": ["es"], "meta_training_minutes": "long"},
        ],
    )
    def test_a_card_by_a_stranger_is_not_trusted(
        self, card: dict[str, object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = save_checkpoint(MetaOptimizer(3), "odd.safetensors", card)
        assert main(["checkpoints", str(path)]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if "odd.safetensors" in line)
        assert row.replace("│", " ").split()[2:4] == ["-", "-"]

    def test_one_that_does_not_verify_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = save_checkpoint(MetaOptimizer(3), "mine.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        assert main(["checkpoints", "default", str(path), "missing", "hf://owner/name"]) == 1
        output = capsys.readouterr().out
        assert read_card("mine.safetensors")["sha256"][:12] in output
        for reason in (
            "mine.safetensors does not verify: mine.safetensors has sha256",
            "missing does not verify: no checkpoint 'missing'",
            "hf://owner/name does not verify: 'hf://owner/name' is no address",
        ):
            assert reason in output
        assert " default " in output

    def test_nothing_but_failures(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["checkpoints", "missing"]) == 1
        assert capsys.readouterr().out.startswith("missing does not verify: ")


@pytest.mark.parametrize(
    "command", [["demo"], ["inspect", "zoo_of_models:mlp", "--input", "5,4"], ["meta-train"], ["checkpoints"]]
)
def test_missing_extra_is_named(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_mistake(main, command, "pip install 'teleport-optim[cli]'", capsys)


@pytest.mark.parametrize("command", [[], ["demo"], ["inspect"], ["meta-train"], ["checkpoints"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: teleport-optim" in capsys.readouterr().out
