"""One pipeline stage of a model: only its own layers, entered and left through the hidden states.

The base model's own forward runs on every stage. Layers of earlier stages become an ``Inlet``, which gives the hidden
states that were received whatever it is given; the layer after the stage's last becomes an ``Outlet``, which ends the
forward there. So whatever a family does before its layers (position embeddings, a norm, a scaling) has no effect but
on the first stage, and whatever it does after them none but on the last; modules with parameters that only others
need become a ``Blank``. The list of layers keeps its length, since configs describe layers by their place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cluster.domain.errors import UnsupportedModelError
from cluster.domain.parallel_layout import Stage
from cluster.engine.model import probe

# Given to layers by some families; our attention has slopes of its own and needs no mask.
_UNUSED_ARGUMENTS = frozenset({"alibi", "position_bias", "attention_mask"})


@dataclass
class Received:
    """The hidden states from the stage before, ``[1, tokens, hidden_size]``; set for each step."""

    hidden: torch.Tensor | None = None


class StageEnd(Exception):  # noqa: N818 - not an error: it carries the hidden states out of the base model's forward
    """Raised by the Outlet."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Gap(nn.Module):
    """In a layer's place, with the attributes by which the base model decides what to hand it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and not isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value)


class Inlet(_Gap):
    """Gives what was received; ``as_tuple``: in the form in which the layers of this family return it."""

    def __init__(self, layer: nn.Module, received: Received, *, as_tuple: bool) -> None:
        super().__init__(layer)
        self._received, self._as_tuple = received, as_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        hidden = self._received.hidden
        assert hidden is not None
        return (hidden,) if self._as_tuple else hidden


class Outlet(_Gap):
    """Ends the base model's forward with the hidden states it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageEnd(args[0] if args else kwargs["hidden_states"])


class Blank(nn.Module):
    """In the place of a module whose result does not matter here: zeros of its width."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        leading = given.shape[:-1] if given.is_floating_point() else given.shape
        return torch.zeros(*leading, self._width, dtype=self._dtype, device=given.device)


@dataclass
class Trace:
    """What one forward of the whole model on meta showed."""

    returns_tuple: bool = False
    entry: dict[str, int] = field(default_factory=dict)  # modules with parameters called before the layers: widths
    exit: dict[str, int] = field(default_factory=dict)  # and after them
    objection: str = ""


def trace(model: Any, layer_path: str) -> Trace:
    """Runs ``model`` (whole, on meta) once; UnsupportedModelError where its layers cannot be divided into stages."""
    base, layers = model.base_model, model.get_submodule(layer_path)
    seen, found = _Seen(), Trace()
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Callable[..., Any], *, before: bool = False) -> None:
            if before:
                stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(function).remove)

        inside = {id(module) for layer in layers for module in layer.modules()}
        for name, module in model.named_modules():
            if id(module) in inside or module in (model, base, layers):
                continue
            hook(module, _outside_hook(name, seen, found))
        for layer in layers:
            hook(layer, _before_layer(seen, found), before=True)
            hook(layer, _after_layer(seen, found))
        probe.examine(model)
    if seen.layers != len(layers):
        found.objection = found.objection or "they do not run one after the other"
    if found.objection:
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} cannot be divided into pipeline stages: {found.objection}; serve it "
            "with --pipeline-parallel-size 1."
        )
    return found


@dataclass
class _Seen:
    layers: int = 0
    harmless: set[int] = field(default_factory=set)  # ids of tensors that no parameter had a part in
    kept: list[Any] = field(default_factory=list)  # so that ids stay theirs


def _outside_hook(name: str, seen: _Seen, found: Trace) -> Callable[..., None]:
    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        own = list(module.parameters(recurse=False))
        if not own:
            if not any(True for _ in module.parameters()):
                tensors = _tensors(output)
                seen.kept += tensors
                seen.harmless |= {id(tensor) for tensor in tensors}
            return
        if isinstance(output, torch.Tensor):
            (found.exit if seen.layers else found.entry)[name] = output.shape[-1]

    return hook


def _before_layer(seen: _Seen, found: Trace) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        extra = {str(index): value for index, value in enumerate(args[1:])}
        extra |= {name: value for name, value in kwargs.items() if name not in _UNUSED_ARGUMENTS}
        if not args:
            extra.pop("hidden_states", None)
        for name, value in extra.items():
            for tensor in _tensors(value):
                if tensor.is_floating_point() and id(tensor) not in seen.harmless:
                    found.objection = found.objection or f"they are given more than hidden states ({name})"

    return hook


def _after_layer(seen: _Seen, found: Trace) -> Callable[..., None]:
    def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
        seen.layers += 1
        found.returns_tuple = isinstance(output, tuple)

    return hook


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def keep_stage(model: Any, layer_path: str, stage: Stage, found: Trace, received: Received) -> None:
    """Drops from ``model`` (on meta) everything that ``stage`` does not run."""
    layers = model.get_submodule(layer_path)
    dtype = next(model.parameters()).dtype
    for index, layer in enumerate(layers):
        if index < stage.layers.start:
            layers[index] = Inlet(layer, received, as_tuple=found.returns_tuple)
        elif index >= stage.layers.stop:
            layers[index] = Outlet(layer)
    blank = dict(found.entry) if not stage.is_first else {}
    if not stage.is_last:
        blank |= found.exit
        head = model.get_output_embeddings()
        blank[next(name for name, module in model.named_modules() if module is head)] = 1
    for name, width in blank.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Blank(width, dtype))
