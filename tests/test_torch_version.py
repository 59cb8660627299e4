"""A torch that is newer than anything that was tried says so."""

import warnings

import pytest

import teleport_optim


@pytest.mark.parametrize("version", ["2.9.0", "2.15.0+cpu", "2.99.1a0+git123"])
def test_a_known_major_version_passes_in_silence(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teleport_optim._check_torch(version)


@pytest.mark.parametrize("version", ["3.0.0", "10.1.0+cu130"])
def test_a_newer_one_is_named_with_a_remedy(version: str) -> None:
    with pytest.warns(UserWarning, match=f"this is torch {version.split('+')[0]}.*teleport=False"):
        teleport_optim._check_torch(version)
