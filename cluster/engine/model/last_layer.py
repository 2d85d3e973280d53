"""The last decoder layer computes only what is sampled from: of a prompt's other tokens it keeps keys and values.

Nothing looks at its other results where all that a base model does behind its layers (a norm, a projection, a
scaling) is done for each token alone. That is tried out on the very model; else the layer computes all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from cluster.engine.model import agreement
from cluster.engine.step import SequenceKey, StepEntry, StepPlan

_LOG = logging.getLogger(__name__)
# Fewer tokens than these cost little beside the weights that are read once more for keys and values.
_LEAST_LEFT_OUT = 16
# What the steps of the proof need of a KV cache.
BLOCKS, BLOCK_SIZE, SEQUENCES, LONGEST = 9, 16, 3, 48
_TOKENS = 29  # different ones: less than any vocabulary


class PrunableLayer(Protocol):
    """Who a layer's ``forward`` belongs to if it can leave results out."""

    def leave_out(self, *, others: bool) -> None:
        """Whether, where that ``pays``, its results are only of the tokens after which one is sampled."""


def pays(tokens: int, sampled: int) -> bool:
    """Whether a step of so many tokens is faster when only the ``sampled`` ones go through the whole layer.

    Keys and values of all are computed beside that: a tenth to two fifths of a layer's arithmetic.
    """
    return not sampled or tokens - sampled >= max(_LEAST_LEFT_OUT, sampled)


def prune(
    layers: Sequence[nn.Module],
    run: Callable[[Sequence[StepPlan]], list[torch.Tensor]],
    unanimous: Callable[[bool], bool],
) -> bool:
    """Lets the last of ``layers`` leave out what is not sampled from, if the base model gives the same without it.

    ``layers`` are all that run on the last stage, in order. ``run`` gives the last hidden states ``[sampled, width]``
    of each step, in an empty cache as above. All ranks of a group call this at the same time with layers that are
    alike; ``unanimous`` says whether all of them vote yes.
    """
    last = _prunable(layers[-1])
    if last is None:
        return False
    right = False
    try:
        with _skipped(layers[:-1]):
            right = _gives_the_same(layers, last, run)
    except Exception as error:  # boundary: any family's base model, given fewer rows than it was asked for
        _LOG.debug("%s computes every token: %s", type(layers[-1]).__name__, error)
    if not unanimous(right):
        last.leave_out(others=False)
        return False
    return True


def _prunable(layer: nn.Module) -> PrunableLayer | None:
    owner: Any = getattr(layer.forward, "__self__", None)
    return owner if hasattr(owner, "leave_out") else None


@contextmanager
def _skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that could be the last give what they are given: the proof is about what comes behind the last."""
    before = [(layer, layer.forward) for layer in layers if _prunable(layer) is not None]
    for layer, _ in before:
        layer.forward = _give_back
    try:
        yield
    finally:
        for layer, forward in before:
            layer.forward = forward


def _give_back(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _gives_the_same(
    layers: Sequence[nn.Module], last: PrunableLayer, run: Callable[[Sequence[StepPlan]], list[torch.Tensor]]
) -> bool:
    plans = _plans()
    called: list[int] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(_note(called, index)).remove)
        expected = run(plans)
    if called != list(range(len(layers))) * len(plans):
        return False  # something may follow the last one, or look at it again
    last.leave_out(others=True)
    got = run(plans)
    return all(_agree(mine, other) for mine, other in zip(got, expected, strict=True))


def _note(called: list[int], index: int) -> Callable[[nn.Module, Any], None]:
    return lambda *_: called.append(index)


def _agree(mine: torch.Tensor, expected: torch.Tensor) -> bool:
    return mine.shape == expected.shape and (not len(expected) or agreement.agree(mine, expected))


def _plans() -> list[StepPlan]:
    """Three sequences: nothing sampled, ends of prompts beside a chunk, a decode beside chunks, and decodes of all."""
    chunks = (
        ((0, 20, False),),
        ((0, 18, False), (1, 17, True), (2, 15, True)),
        ((1, 1, True), (0, 9, True), (2, 16, False)),
        ((0, 1, True), (1, 1, True), (2, 1, True)),
    )
    done, plans, token = [0] * SEQUENCES, [], 0
    for step, chunk in enumerate(chunks, 1):
        entries = []
        for slot, count, sample in chunk:
            own = tuple(range(slot * BLOCKS // SEQUENCES, (slot + 1) * BLOCKS // SEQUENCES))
            blocks = () if done[slot] else own
            ids = tuple(1 + i % _TOKENS for i in range(token, token + count))
            entries.append(StepEntry(SequenceKey(0, slot), slot, ids, done[slot], 0, blocks, sample, LONGEST))
            done[slot] += count
            token += count
        plans.append(StepPlan(step, tuple(entries)))
    return plans
