"""Torch's own tests of optimizers: which parameters, options and gradients are taken and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum, OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase

from teleport_optim.optim.kernels import native
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.torch_infos import (
    INFOS,
    assert_close,
    assert_identical,
    every_input,
    every_optimizer,
    inputs_of,
    make,
    make_params,
    random,
    take_steps,
    values,
)

pytestmark = [*OF_OURS, pytest.mark.private_torch]
error_cases = [
    pytest.param(info, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
    for info in INFOS
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("info", "error"), error_cases)
def test_errors(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    params = given.params if given.params is not None else make_params(info)
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with expected(error.error_type, match=error.error_regex):
            make(info, params, given.kwargs)
        return
    optimizer, before = make(info, params, given.kwargs), values(params)
    with expected(error.error_type, match=error.error_regex):
        optimizer.step()
    assert_identical(values(params), before)
    assert not any(optimizer.state.values())


@every_optimizer
@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ([], ValueError, "optimizer got an empty parameter list"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([Parameter(torch.ones(2, 2)) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": {Parameter(torch.ones(2, 2))}}], TypeError, "ordered collections"),
    ],
    ids=["empty", "number", "no leaf", "set"],
)
def test_bad_parameters(info: OptimizerInfo, params: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(info, params)


@every_optimizer
def test_sparse_gradients(info: OptimizerInfo) -> None:
    param = Parameter(torch.ones(3, 2))
    kwargs, makers = info.metadata_for_sparse
    optimizer = make(info, [param], kwargs)
    moving = [make_scheduler(optimizer) for make_scheduler in makers]
    for _ in range(3):
        param.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]).to_sparse()
        if not info.supports_sparse:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            assert_identical(param.detach(), torch.ones(3, 2))
            return
        optimizer.step()
        for scheduler in moving:
            scheduler.step()
    assert bool((param[0] < 1).all())
    assert bool((param[1:] == 1).all())


@every_input
def test_complex(info: OptimizerInfo, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)  # One kernel for both: another one rounds otherwise.
    if kwargs.get("fused"):
        pytest.skip("fused kernels have no complex numbers")
    param = Parameter(random((4, 3, 2), 0).view(torch.complex64).squeeze(-1))
    optimizer = make(info, [param], kwargs)
    if not info.supports_complex:
        before = values([param])
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="complex"):
            optimizer.step()
        assert_identical(values([param]), before)
        return
    pair = Parameter(torch.view_as_real(param.detach()).clone())
    real = make(info, [pair], kwargs)
    for step in range(3):
        pair.grad = random((4, 3, 2), step)
        param.grad = torch.view_as_complex(pair.grad.clone())
        optimizer.step()
        real.step()
        assert_close(torch.view_as_real(param.detach()), pair.detach())


# With the decorator of torch itself.


class TestUnderOptims(TestCase):
    """The infos are such that torch's own tests could be run with them."""

    @optims(INFOS, dtypes=[torch.float32, torch.float64])
    def test_every_input_makes_an_optimizer_that_steps(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in inputs_of(optim_info):
            params = make_params(optim_info, dtype)
            before = values(params)
            take_steps(make(optim_info, params, given.kwargs), params, 1)
            for param, old in zip(params, before):
                assert not torch.equal(param, old)


instantiate_device_type_tests(TestUnderOptims, globals(), only_for="cpu")
