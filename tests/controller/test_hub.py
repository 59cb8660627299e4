"""Checkpoints from the hub of Hugging Face."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from teleport_optim import CheckpointError, MetaOptimizer, load_checkpoint, save_checkpoint
from tests.helpers.checkpoint_files import MISTAKES, load_or_refuse

COMMIT = "0123456789abcdef" * 2 + "01234567"


class TestHub:
    """Repositories that lie in the cache of ``huggingface_hub``, without a network."""

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The cached weights of ``hf://owner/name@v1``, which is the commit ``COMMIT``."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        repository = tmp_path / "models--owner--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "v1").write_text(COMMIT)
        return save_checkpoint(MetaOptimizer(4), repository / "snapshots" / COMMIT / "meta_optimizer.safetensors")

    @pytest.mark.parametrize("revision", ["v1", COMMIT])
    def test_loads_what_a_file_would_give(self, path: Path, revision: str) -> None:
        loaded = load_checkpoint(f"hf://owner/name@{revision}").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in load_checkpoint(path).state_dict().items())

    @pytest.mark.parametrize(
        "address",
        [
            "hf://",
            "hf://owner/name",
            "hf://owner/name@",
            "hf://name@v1",
            "hf:///name@v1",
            "hf://a/b/c@v1",
            "hf://a/b@v1@v2",
            "hf://a/b@../v1",
            "hf://a/b@v1/..",
            "hf://../b@v1",
            "hf://a/b@v1/",
            "hf://ä/b@v1",
            "hf://a/b@-v",
            "hf://a/b@v1\n",
            "hf://a/b@ v1",
        ],
    )
    def test_what_is_no_address_is_refused(self, address: str) -> None:
        with pytest.raises(CheckpointError, match=r"is no address: write hf://owner/name@revision.*cannot change"):
            load_checkpoint(address)

    @pytest.mark.parametrize("address", ["hf://owner/other@v1", "hf://owner/name@v2", f"hf://owner/name@{'0' * 40}"])
    def test_what_is_not_there_is_refused(self, path: Path, address: str) -> None:
        reason = "cannot fetch meta_optimizer.json of {} \\(.*offline.*\\): check the address and the network"
        with pytest.raises(CheckpointError, match=reason.format(address)) as caught:
            load_checkpoint(address)
        assert str(caught.value).isprintable()

    def test_a_name_that_the_hub_does_not_allow_is_refused(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot fetch .*owner--name"):
            load_checkpoint("hf://owner/owner--name@v1")

    @pytest.mark.parametrize("kind", MISTAKES)
    def test_nothing_is_trusted(self, path: Path, kind: str) -> None:
        spoil, message = MISTAKES[kind]
        messages = {
            "missing": "cannot fetch meta_optimizer.safetensors of hf://owner/name@v1 ",
            "no card": "cannot fetch meta_optimizer.json of hf://owner/name@v1 ",
            "a folder": "cannot read .*Is a directory",
            "of many bytes": "cannot fetch meta_optimizer.safetensors .*has 68719476736 bytes, of at most 67108864",
            "card of many bytes": "cannot fetch meta_optimizer.json .*bytes, of at most 262144",
        }
        assert load_or_refuse(path)
        spoil(path)
        with pytest.raises(CheckpointError, match=messages.get(kind, message)):
            load_checkpoint("hf://owner/name@v1")

    def test_both_files_are_of_one_commit(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        calls = []
        download = huggingface_hub.hf_hub_download

        def record(*arguments: str, **options: Any) -> object:
            calls.append((arguments[1], options["revision"]))
            return download(*arguments, **options)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
        load_checkpoint("hf://owner/name@v1")
        card, weights = "meta_optimizer.json", "meta_optimizer.safetensors"
        assert calls == [(card, "v1"), (card, COMMIT), (weights, COMMIT), (weights, COMMIT)]

    def test_whatever_goes_wrong_is_said_in_one_line(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: str, **options: Any) -> None:
            raise RuntimeError("the wire\nwas cut\x1b" + 999 * "!")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(CheckpointError, match=r"\(the wire was cut\?!+\)") as caught:
            load_checkpoint("hf://owner/name@v1")
        assert len(str(caught.value)) < 500

    def test_the_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'teleport-optim\[hub\]'"):
            load_checkpoint("hf://owner/name@v1")
