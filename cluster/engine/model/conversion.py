"""Which tensors of a checkpoint make up each parameter of the model, and where in it they go.

transformers holds some parameters under other names and in other shapes than checkpoints do (Mixtral's experts are
one three-dimensional tensor of many small ones). Its own rules are followed here, but on shapes alone: the outcome is
a list of blocks, so that a rank can read its slices of them in place and never builds the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.checkpoint.headers import TensorHeader
from cluster.domain.errors import CheckpointError, UnsupportedModelError

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """The elements ``source_box`` of a checkpoint's tensor, which fill ``target_box`` of a parameter.

    Boxes are (start, stop) for each dimension. The parameter may have dimensions that the tensor lacks; there the
    target box is one wide. ``transposed``: the tensor's last two dimensions are the other way round.
    """

    header: TensorHeader
    source_box: Box
    target_box: Box
    transposed: bool = False


def sources(model: Any, tensors: Mapping[str, TensorHeader]) -> dict[str, tuple[Source, ...]]:
    """For each parameter and each stored buffer of ``model`` (on meta, unsharded) what fills it.

    Names are those of ``model.state_dict()``; of a tied weight only the first is there. Tensors that nothing needs
    are passed over. CheckpointError when something is missing or has another shape than the config implies,
    UnsupportedModelError for a conversion that cannot be read in place.
    """
    found: dict[str, _Assembly] = {}
    for name, target, converter, pattern in _renamed(model, tensors):
        if converter is None:
            found.setdefault(target, _Assembly(whole=tensors[name]))
        else:
            found.setdefault(target, _Assembly(converter)).parts.setdefault(pattern, []).append(tensors[name])
    pieces: dict[str, _Piece] = {}
    for target, assembly in found.items():
        pieces.update(assembly.pieces(model, target))
    result = {}
    for names, shape in _wanted(model):
        stored = next((name for name in names if name in pieces), None)
        if stored is None:
            raise CheckpointError(
                f"The checkpoint has no tensor for {names[0]}; download or export it again, completely."
            )
        result[names[0]] = pieces[stored].sources(stored, shape)
    return result


def _renamed(model: Any, tensors: Iterable[str]) -> Iterable[tuple[str, str, Any, str]]:
    """(name in the checkpoint, name in the model, converter or None, its pattern) of every tensor that is used.

    The order is transformers' own, in which the layers and experts of a list come by number.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(tensors, key=dot_natural_key):
        target, matched = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, matched = name, None
        if target in state:
            yield name, target, by_pattern.get(matched or ""), matched or ""


def _wanted(model: Any) -> list[tuple[list[str], tuple[int, ...]]]:
    """Every distinct tensor that the checkpoint must fill: all its names (tied ones have several) and its shape."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        shapes[id(tensor)] = tuple(tensor.shape)
    return [(names[key], shapes[key]) for key in names]


@dataclass(frozen=True, slots=True)
class _Block:
    """``box`` of a source tensor, at ``place`` of a larger one whose dimension d is the source's ``axes[d]``."""

    header: TensorHeader
    box: Box
    place: Box
    axes: tuple[int | None, ...]

    def within(self, dim: int, start: int, stop: int) -> _Block | None:
        """The part from ``start`` to ``stop`` of dimension ``dim``, counted from ``start``; None if there is none."""
        own_start, own_stop = self.place[dim]
        low, high = max(own_start, start), min(own_stop, stop)
        if low >= high:
            return None
        box, axis = list(self.box), self.axes[dim]
        if axis is not None:
            first = box[axis][0] + low - own_start
            box[axis] = (first, first + high - low)
        return replace(self, box=tuple(box), place=_with(self.place, dim, (low - start, high - start)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor that exists on paper: its shape and the blocks it is made of."""

    shape: tuple[int, ...]
    blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, header: TensorHeader) -> _Piece:
        box = tuple((0, size) for size in header.shape)
        return cls(header.shape, (_Block(header, box, box, tuple(range(len(box)))),))

    def sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        """As the result for the parameter ``name`` of ``shape``."""
        if self.shape != shape:
            first = self.blocks[0].header
            several = f" and {len(self.blocks) - 1} more" if len(self.blocks) > 1 else ""
            raise CheckpointError(
                f"{first.file}: {first.name}{several} has shape {list(first.shape)}, which gives {name} the shape "
                f"{list(self.shape)}, but config.json implies {list(shape)}; check the sizes in config.json."
            )
        return tuple(
            Source(block.header, block.box, block.place, transposed=_is_transposed(name, block))
            for block in self.blocks
        )


def _is_transposed(name: str, block: _Block) -> bool:
    axes = [axis for axis in block.axes if axis is not None]
    if axes == sorted(axes):
        return False
    if axes[:-2] == sorted(axes[:-2]) and axes[-2] == axes[-1] + 1 and axes[-2] == len(axes) - 1:
        return True
    raise UnsupportedModelError(f"{name} is stored with its dimensions in an order that cannot be read in place.")


@dataclass(slots=True)
class _Assembly:
    """What the checkpoint has for one parameter, or for the first of those that a converter makes."""

    converter: Any = None
    whole: TensorHeader | None = None
    parts: dict[str, list[TensorHeader]] = field(default_factory=dict)

    def pieces(self, model: Any, target: str) -> dict[str, _Piece]:
        """By the name of the parameter each piece is for."""
        if self.whole is not None:
            return {target: _Piece.of(self.whole)}
        step = _Step(model, target, list(self.converter.source_patterns), list(self.converter.target_patterns))
        state: dict[str, list[_Piece]] = {p: [_Piece.of(h) for h in headers] for p, headers in self.parts.items()}
        for operation in self.converter.operations:
            rule = _RULES.get(type(operation).__name__)
            if rule is None:
                raise UnsupportedModelError(
                    f"{target} is stored in a form that transformers converts with {type(operation).__name__}, which "
                    "cannot be read in place; save the model with today's transformers and serve that."
                )
            state = rule(operation, state, step)
        first = step.targets[0]
        return {target.replace(first, name): pieces[0] for name, pieces in state.items()}


@dataclass(frozen=True, slots=True)
class _Step:
    """Where a converter's operations stand: the model, the parameter's name, and the converter's two sides."""

    model: Any
    name: str
    patterns: list[str]
    targets: list[str]

    def one_name(self, state: Mapping[str, Any], pattern: str) -> str:
        """A single tensor takes the target's name, one of several keeps its own until they are joined."""
        return self.targets[0] if len(state) == 1 and len(self.targets) == 1 else pattern


_State = dict[str, list[_Piece]]


def _merge(operation: Any, state: _State, step: _Step) -> _State:
    """MergeModulelist: tensors of a list stacked along a new dimension."""
    dim, merged = operation.dim, {}
    for pattern, pieces in state.items():
        blocks = [
            replace(
                block,
                place=(*block.place[:dim], (index, index + 1), *block.place[dim:]),
                axes=(*block.axes[:dim], None, *block.axes[dim:]),
            )
            for index, piece in enumerate(pieces)
            for block in piece.blocks
        ]
        shape = (*pieces[0].shape[:dim], len(pieces), *pieces[0].shape[dim:])
        merged[step.one_name(state, pattern)] = [_Piece(shape, tuple(blocks))]
    return merged


def _concatenate(operation: Any, state: _State, step: _Step) -> _State:
    """Concatenate: side by side, in the order of the converter's patterns."""
    pieces = [piece for pattern in step.patterns if pattern in state for piece in state[pattern]]
    dim = operation.dim % len(pieces[0].shape)
    blocks, offset = [], 0
    for piece in pieces:
        for block in piece.blocks:
            start, stop = block.place[dim]
            blocks.append(replace(block, place=_with(block.place, dim, (start + offset, stop + offset))))
        offset += piece.shape[dim]
    return {step.targets[0]: [_Piece(_with(pieces[0].shape, dim, offset), tuple(blocks))]}


def _chunk(operation: Any, state: _State, step: _Step) -> _State:
    """Chunk: equal parts, one for each target (or for each number that the config names)."""
    (pieces,) = state.values()
    targets = operation.get_target_patterns(step.targets, config=step.model.config)
    dim = operation.dim % len(pieces[0].shape)
    size = math.ceil(pieces[0].shape[dim] / len(targets))
    return _cut(pieces[0], dim, targets, [size] * len(targets))


def _split(operation: Any, state: _State, step: _Step) -> _State:
    """Split: parts as large as the parameters they are for."""
    (pieces,) = state.values()
    names = [step.name.replace(step.targets[0], target) for target in step.targets]
    sizes = [step.model.get_parameter(name).shape[operation.dim] for name in names]
    return _cut(pieces[0], operation.dim, step.targets, sizes)


def _cut(piece: _Piece, dim: int, names: list[str], sizes: list[int]) -> _State:
    parts, start = {}, 0
    for name, size in zip(names, sizes, strict=True):
        stop = min(start + size, piece.shape[dim])
        blocks = [block.within(dim, start, stop) for block in piece.blocks]
        parts[name] = [_Piece(_with(piece.shape, dim, stop - start), tuple(b for b in blocks if b is not None))]
        start = stop
    return parts


def _transpose(operation: Any, state: _State, step: _Step) -> _State:
    """Transpose, always or where the shapes say so."""
    ((pattern, pieces),) = state.items()
    piece, name = pieces[0], step.one_name(state, pattern)
    if operation.check_dims and piece.shape == tuple(step.model.get_parameter(step.name).shape):
        return {name: [piece]}
    order = list(range(len(piece.shape)))
    first, second = operation.dim0 % len(order), operation.dim1 % len(order)
    order[first], order[second] = order[second], order[first]
    blocks = [
        replace(b, place=tuple(b.place[i] for i in order), axes=tuple(b.axes[i] for i in order)) for b in piece.blocks
    ]
    return {name: [_Piece(tuple(piece.shape[i] for i in order), tuple(blocks))]}


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


_RULES: dict[str, Callable[[Any, _State, _Step], _State]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}
