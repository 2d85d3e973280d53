"""Stamps around what a rank does in a step, and what two ranks' stamps say together. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

# What is timed: the whole share of a step; oneDNN's products; the all-reduce as the model calls it, and the kernel's
# call inside of it; attention; the other compiled kernels.
KINDS = ("share", "product", "reduce", "reduce_kernel", "attention", "small_kernels")
Event = tuple[str, float, float]  # kind, beginning, end; CLOCK_MONOTONIC, which all processes share


class Timers:
    """Wraps callables; while ``on``, each call leaves an event."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[Event] = []

    def wrap(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        assert kind in KINDS, kind

        def timed(*arguments: Any, **named: Any) -> Any:
            if not self.on:
                return call(*arguments, **named)
            started = time.monotonic()
            result = call(*arguments, **named)
            self.events.append((kind, started, time.monotonic()))
            return result

        return timed

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def steps_of(events: Sequence[Event]) -> list[dict[str, list[Event]]]:
    """Events by step and kind. An outer event ends, and so stands, behind those inside of it."""
    steps, step = [], {kind: [] for kind in KINDS}
    for event in events:
        step[event[0]].append(event)
        if event[0] == "share":
            steps.append(step)
            step = {kind: [] for kind in KINDS}
    return steps


def spent(events: Sequence[Event]) -> float:
    return sum(end - started for _, started, end in events)


def parts_of_step(own: dict[str, list[Event]], peer: dict[str, list[Event]] | None = None) -> dict[str, float]:
    """Where one rank's share of one step went, in seconds; the parts add up to ``share``.

    ``waiting``: in the all-reduce until the slowest rank came to it. ``summing``: from then on. ``reduce_call``: what
    the calls cost around the kernel's. ``gathering``: all of it for the last one, in which the logits travel.
    ``rest``: Python and torch's own operations.
    """
    found = {kind: spent(own[kind]) for kind in ("share", "product", "attention", "small_kernels")}
    found |= dict.fromkeys(("waiting", "summing", "reduce_call", "gathering"), 0.0)
    kernels = own["reduce_kernel"]
    if kernels:
        assert peer is not None
        assert len(peer["reduce_kernel"]) == len(kernels), "the ranks do not do the same"
        calls = [_call_around(kernel, own["reduce"]) for kernel in kernels]
        *inner, last = zip(kernels, peer["reduce_kernel"], calls, strict=True)
        for (_, started, end), (_, peer_started, _), (_, call_started, call_end) in inner:
            both = max(started, peer_started)
            found["waiting"] += both - started
            found["summing"] += max(0.0, end - both)
            found["reduce_call"] += (call_end - call_started) - (end - started)
        found["gathering"] = last[2][2] - last[2][1]
    known = sum(value for name, value in found.items() if name != "share")
    return found | {"rest": found["share"] - known}


def _call_around(kernel: Event, calls: Sequence[Event]) -> Event:
    """The call that ``kernel`` was made in; itself where the operator was called directly."""
    return next((call for call in calls if call[1] <= kernel[1] and kernel[2] <= call[2]), kernel)


def medians_ms(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(1e3 * statistics.median(row[name] for row in rows), 4) for name in rows[0]}
