"""Rotary embeddings after loading: buffers that no checkpoint holds, and frequencies that depend on a length.

transformers takes the largest position of the whole batch for types whose frequencies depend on the length (dynamic,
longrope), and remembers it. Alone, a sequence gets: its prompt the frequencies of the prompt's length, each later
token those of its own position + 1. That is what is computed here for every token of a packed step.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.domain.errors import UnsupportedModelError
from cluster.engine.step import StepEntry

# Lengths whose frequencies are kept: 4 MB for heads of 128.
_TABLES_KEPT = 16_384
Lengths = npt.NDArray[np.int64]


class Rotary:
    """Tells the rotary modules of a model, before each step, how long each token's sequence is."""

    def __init__(self, ropes: Sequence[_RopeByLength]) -> None:
        self._ropes = tuple(ropes)

    @property
    def by_length(self) -> bool:
        """Whether anything here depends on lengths: such a step is not the same computation each time."""
        return bool(self._ropes)

    def begin(self, entries: Sequence[StepEntry]) -> None:
        """What the next forward pass computes. Of a token the length is max(num_prompt, position + 1)."""
        if not self._ropes:
            return
        longest = max(max(entry.num_prompt, entry.end) for entry in entries)
        lengths: Lengths | None = None
        for rope in self._ropes:
            if longest > rope.original_len and lengths is None:
                lengths = token_lengths(entries)
            rope.begin(lengths if longest > rope.original_len else None)


def token_lengths(entries: Sequence[StepEntry]) -> Lengths:
    """Of each token of a step, in order, the length that its frequencies follow."""
    parts = [np.maximum(np.arange(e.start + 1, e.end + 1, dtype=np.int64), e.num_prompt) for e in entries]
    return np.concatenate(parts)


def rebuild(model: nn.Module, device: torch.device) -> Rotary:
    """Computes what no checkpoint holds: every non-persistent buffer of ``model`` that is still on meta.

    As ``from_pretrained`` does it, by the family's own rule; inverse frequencies in float32 whatever the weights are.
    Parameters stay as they are. UnsupportedModelError names a buffer that the rule does not fill.
    """
    ropes = []
    for name, module, owner in _modules(model):
        meta = {key: module._buffers[key] for key in module._non_persistent_buffers_set}  # noqa: SLF001
        meta = {key: buffer for key, buffer in meta.items() if buffer is not None and buffer.is_meta}
        if meta:
            _fill(name, module, owner, meta, device)
        ropes += _ropes_by_length(module, device)
    return Rotary(ropes)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, the innermost model of transformers that it belongs to) of each module."""
    found: list[tuple[str, nn.Module, Any]] = []
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        above = owners.get(name.rpartition(".")[0], model)
        owners[name] = module if hasattr(module, "_init_weights") else above
        found.append((name, module, owners[name]))
    return found


def _fill(name: str, module: nn.Module, owner: Any, meta: dict[str, Any], device: torch.device) -> None:
    """Two fillings from different beginnings are equal only where every element was written."""
    first = _computed(module, owner, meta, device, 0)
    second = _computed(module, owner, meta, device, 1)
    for key, buffer in first.items():
        if not torch.equal(buffer, second[key]):
            where = ".".join(part for part in (name, key) if part)
            raise UnsupportedModelError(
                f"{type(owner).__name__} computes its buffer {where} in a way that is not known here; this family "
                "cannot be served."
            )
    module._buffers.update(first)  # noqa: SLF001


def _computed(
    module: nn.Module, owner: Any, meta: dict[str, Any], device: torch.device, before: int
) -> dict[str, torch.Tensor]:
    """The module's buffers by its family's rule, in memory that held ``before``. Its parameters are out of reach."""
    buffers = {
        key: torch.full(
            buffer.shape, before, dtype=torch.float32 if key.endswith("inv_freq") else buffer.dtype, device=device
        )
        for key, buffer in meta.items()
    }
    parameters = module._parameters  # noqa: SLF001 - put back below
    on_meta = {
        key: p if p is None else nn.Parameter(p.to("meta"), requires_grad=False) for key, p in parameters.items()
    }
    module._buffers.update(buffers)  # noqa: SLF001 - a buffer keeps its name and whether it is saved
    module._parameters = on_meta  # noqa: SLF001
    try:
        with torch.no_grad():
            fill = getattr(module, "fill_buffers", None)  # families of ours
            if callable(fill):
                fill()
            else:
                owner._init_weights(module)  # noqa: SLF001 - what from_pretrained calls
    finally:
        module._parameters = parameters  # noqa: SLF001
    return {key: getattr(module, key) for key in buffers}


def _ropes_by_length(module: nn.Module, device: torch.device) -> list[_RopeByLength]:
    """The parts of a rotary module that depend on the length: one, or one for each of several layer types."""
    kinds = getattr(module, "rope_type", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
    ropes = {
        layer_type: _RopeByLength(module, kind, layer_type, device)
        for layer_type, kind in by_layer_type.items()
        if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)
    }
    if ropes:
        plain = module.forward

        def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
            rope = ropes.get(layer_type)
            if rope is not None:
                return rope.forward(x, position_ids)
            return plain(x, position_ids) if layer_type is None else plain(x, position_ids, layer_type)

        module.forward = forward
    return list(ropes.values())


class _RopeByLength:
    """One set of frequencies of one rotary module.

    All of today's text models multiply positions with ``inv_freq`` element by element, so a row of frequencies for
    each token does it in one pass; whether this one does is tried out once. Where it does not, its own forward runs
    once for each length, as if that sequence were alone.
    """

    def __init__(self, module: Any, kind: str, layer_type: str | None, device: torch.device) -> None:
        self._module, self._kind, self._device = module, kind, device
        self._arguments = () if layer_type is None else (layer_type,)
        self._layer_type = layer_type
        self._buffer = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        self._base: torch.Tensor = getattr(module, self._buffer).clone()
        self._decorated: Callable[..., Any] = module.forward
        self._undecorated: Callable[..., Any] = inspect.unwrap(type(module).forward)
        parameters = module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        self.original_len = int(
            parameters["original_max_position_embeddings"]
            if kind == "longrope"
            else module.config.max_position_embeddings
        )
        self._tables: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._lengths: Lengths | None = None
        self._rows: torch.Tensor | None = None
        self._one_pass = True
        self._one_pass = self._tokens_may_differ()

    def begin(self, lengths: Lengths | None) -> None:
        """``lengths`` of the next pass's tokens; None when none is beyond ``original_len``."""
        self._lengths = lengths
        self._rows = self._rows_of(lengths) if lengths is not None and self._one_pass else None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """The module's own result, each token with the frequencies of its length."""
        if self._lengths is not None and not self._one_pass:
            return self._by_groups(x, position_ids, self._lengths)
        if self._lengths is None and self._one_pass:
            return self._run(x, position_ids, self._base)
        if self._lengths is None:
            return self._alone(x, position_ids, self.original_len)
        assert self._rows is not None
        return self._run(x, position_ids, self._rows)

    def _run(self, x: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor) -> Any:
        self._module._buffers[self._buffer] = inv_freq  # noqa: SLF001 - it must not be copied
        return self._undecorated(self._module, x, position_ids, *self._arguments)

    def _rows_of(self, lengths: Lengths) -> torch.Tensor:
        distinct, inverse = np.unique(np.maximum(lengths, self.original_len), return_inverse=True)
        if len(distinct) == 1:
            return self._frequencies(int(distinct[0])).unsqueeze(0)
        rows = torch.stack([self._frequencies(int(length)) for length in distinct])
        return rows[torch.from_numpy(inverse).to(self._device)]

    def _frequencies(self, length: int) -> torch.Tensor:
        """Inverse frequencies of a sequence of ``length`` tokens, from transformers' own function."""
        if length <= self.original_len:
            return self._base
        key = self.original_len + 1 if self._kind == "longrope" else length
        found = self._tables.get(key)
        if found is None:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            # A tensor, as in the model's own forward: a Python number would be rounded differently.
            asked = key if self._kind == "longrope" else torch.tensor(key, device=self._device)
            found, _ = ROPE_INIT_FUNCTIONS[self._kind](
                self._module.config, self._device, seq_len=asked, layer_type=self._layer_type
            )
            self._tables[key] = found
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        return found

    def _by_groups(self, x: torch.Tensor, position_ids: torch.Tensor, lengths: Lengths) -> Any:
        """One run of the module for each length; positions ``[..., tokens]``, results ``[..., tokens, n]``."""
        groups: dict[int, list[int]] = {}
        most = self.original_len + 1 if self._kind == "longrope" else None
        for index, length in enumerate(np.clip(lengths, self.original_len, most).tolist()):
            groups.setdefault(length, []).append(index)
        parts, order = [], []
        for length, indices in groups.items():
            at = torch.tensor(indices, device=self._device)
            parts.append(self._alone(x, position_ids[..., at], length))
            order.append(at)
        back = torch.argsort(torch.cat(order))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(part, dim=-2)[..., back, :] for part in zip(*parts, strict=True))
        return torch.cat(parts, dim=-2)[..., back, :]

    def _alone(self, x: torch.Tensor, position_ids: torch.Tensor, length: int) -> Any:
        """The decorated forward of a module that has seen no other sequence: the last position tells it the length."""
        module = self._module
        module._buffers[self._buffer] = self._base.clone()  # noqa: SLF001
        module.max_seq_len_cached = module.original_max_seq_len
        last = torch.full_like(position_ids[..., :1], length - 1)
        result = self._decorated(x, torch.cat((position_ids, last), dim=-1), *self._arguments)
        if isinstance(result, tuple):
            return tuple(part[..., :-1, :] for part in result)
        return result[..., :-1, :]

    def _tokens_may_differ(self) -> bool:
        """Whether rows of frequencies give exactly what the module's own forward gives for each length alone."""
        n = self.original_len
        lengths = np.array([1, n, n, n + 1, n + 1, n + 3, n + 3], dtype=np.int64)
        positions = torch.tensor([[0, 0, n - 1, 1, n, n - 1, n + 2]], device=self._device)
        x = torch.empty(1, 1, dtype=torch.float32, device=self._device)
        expected = self._by_groups(x, positions, lengths)
        try:
            got = self._run(x, positions, self._rows_of(lengths))
        except (RuntimeError, TypeError):  # shapes that do not fit: it computes in another way
            return False
        finally:
            self._module._buffers[self._buffer] = self._base  # noqa: SLF001
        if not isinstance(expected, tuple):
            expected, got = (expected,), (got,)
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(expected, got, strict=True))
