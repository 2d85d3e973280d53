"""What the stamps of two ranks say about a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ops.bench.tensor_parallel import timers

FOLDER = Path(timers.__file__).parent


def test_waiting_is_told_from_summing_and_the_parts_add_up() -> None:
    own = [
        ("product", 0.0, 2.0), ("reduce_kernel", 2.5, 5.0), ("reduce", 2.2, 5.1), ("attention", 5.1, 5.6),
        ("reduce_kernel", 7.0, 7.5), ("reduce", 6.9, 7.6), ("share", 0.0, 8.0),
    ]  # fmt: skip
    peer = [("reduce_kernel", 4.5, 4.9), ("reduce_kernel", 6.0, 7.4), ("share", 0.0, 8.0)]
    [mine], [theirs] = timers.steps_of(own), timers.steps_of(peer)
    found = timers.parts_of_step(mine, theirs)
    assert found == pytest.approx(
        {
            "share": 8.0, "product": 2.0, "attention": 0.5, "small_kernels": 0.0,
            "waiting": 2.0, "summing": 0.5, "reduce_call": 0.4, "gathering": 0.7, "rest": 1.9,
        }
    )  # fmt: skip
    assert sum(found.values()) == pytest.approx(2 * found["share"])
    # The one that comes last does not wait.
    of_peer = timers.parts_of_step(theirs, mine)
    assert of_peer["waiting"] == 0
    assert of_peer["summing"] == pytest.approx(0.4)


def test_ranks_that_do_not_do_the_same_are_no_measurement() -> None:
    one = timers.steps_of([("reduce_kernel", 0.0, 1.0), ("reduce_kernel", 1.0, 2.0), ("share", 0.0, 2.0)])
    other = timers.steps_of([("reduce_kernel", 0.0, 1.0), ("share", 0.0, 2.0)])
    with pytest.raises(AssertionError, match="not do the same"):
        timers.parts_of_step(one[0], other[0])


def test_timers_leave_events_only_while_they_are_on() -> None:
    found = timers.Timers()
    call = found.wrap("product", lambda x, *, y: x + y)
    assert call(1, y=2) == 3
    assert not found.events
    found.on = True
    assert call(1, y=2) == 3
    [(kind, started, ended)] = found.take()
    assert (kind, started <= ended, found.events) == ("product", True, [])


def test_help_says_what_it_measures() -> None:
    told = subprocess.run(
        [sys.executable, FOLDER / "measure", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "TP 2 on two cores" in told
