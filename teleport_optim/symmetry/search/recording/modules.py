"""Hooks on the copy of a model: they tell to which module a call belongs, and where nothing passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks

from teleport_optim.symmetry.inputs import SilentHook
from teleport_optim.symmetry.search.recording.twin import Scripted

if TYPE_CHECKING:
    from teleport_optim.symmetry.search.recording.recorder import Recorder

__all__ = ["watch_modules"]


def watch_modules(recorder: Recorder, twin: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Tell the recorder which module runs, and let nothing pass modules that have hooks or are scripted.

    Args:
        recorder: The recorder.
        twin: The copy of the model.
        originals: The modules of the model itself, which have its hooks.
    """
    for name, module in twin.named_modules():
        if isinstance(module, Scripted):
            module.call = _scripted(recorder, name)
            continue
        reason = _reason_of_hooks(originals[name])
        if reason:
            recorder.refuse(name, reason)
            for parameter in [*module.parameters(), *module.buffers()]:
                recorder.pin(parameter)
        module.register_forward_pre_hook(_enter(recorder, name, bool(reason)), with_kwargs=True)
        module.register_forward_hook(_leave(recorder, name, bool(reason)), with_kwargs=True)


def _reason_of_hooks(module: nn.Module) -> str:
    """Reason why nothing passes a module with hooks; empty where it has none."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, SilentHook) for hook in hooks):
        return "it has forward hooks, which may change what it computes: remove them"
    # torch has no other place that tells of hooks on all modules
    backward = [*module._backward_hooks, *module._backward_pre_hooks]
    if backward or _global_backward_hooks or _global_backward_pre_hooks:
        return "it has backward hooks, which may change its gradients: remove them"
    return ""


def _enter(recorder: Recorder, name: str, is_hooked: bool) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.module = name
        if is_hooked:
            recorder.pin((args, kwargs))

    return hook


def _leave(recorder: Recorder, name: str, is_hooked: bool) -> Any:
    parent = name.rpartition(".")[0]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.module = parent
        if is_hooked:
            recorder.pin(output)

    return hook


def _scripted(recorder: Recorder, name: str) -> Callable[..., Any]:
    """Make the call of a scripted module, whose operations are not recorded."""

    def call(original: torch.jit.ScriptModule, *args: Any, **kwargs: Any) -> Any:
        recorder.refuse(name, "it is scripted, so that its operations cannot be followed: leave torch.jit.script out")
        tensors = [*original.named_parameters(name), *original.named_buffers(name)]
        recorder.graph.used |= {own for own, _ in tensors}
        recorder.pin((args, kwargs))
        recorder.is_paused = True
        try:
            # with optimisation, the module would learn from the shapes and types of this call
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                output = original(*args, **kwargs)
        finally:
            recorder.is_paused = False
        for _, tensor in tensors:  # other modules may share them
            recorder.pin(recorder.fakes.of(tensor))
        return output

    return call
