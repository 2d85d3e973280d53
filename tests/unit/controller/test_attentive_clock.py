import asyncio

import pytest

from cluster.controller.attentive_clock import AttentiveClock, keep_ticking
from cluster.domain.clock import ManualClock


def test_time_between_ticks_counts():
    base = ManualClock(100.0)
    clock = AttentiveClock(base, slack_s=1.0)
    for _ in range(10):
        base.advance(0.3)
        clock.tick()
    assert clock.now() == pytest.approx(103.0)


def test_a_gap_counts_as_its_slack_before_and_after_the_next_tick():
    base = ManualClock(0.0)
    clock = AttentiveClock(base, slack_s=1.0)
    base.advance(6.0)
    assert clock.now() == 1.0, "the first to wake may be the one who judges"
    clock.tick()
    assert clock.now() == 1.0
    base.advance(0.5)
    assert clock.now() == 1.5


def test_it_never_runs_backwards():
    base = ManualClock(0.0)
    clock = AttentiveClock(base, slack_s=1.0)
    seen = [clock.now()]
    for step in (0.2, 3.0, 0.1, 0.9, 50.0, 0.4):
        base.advance(step)
        seen.append(clock.now())
        clock.tick()
        seen.append(clock.now())
    assert seen == sorted(seen)


async def test_the_task_ticks():
    base = ManualClock(0.0)
    clock = AttentiveClock(base, slack_s=1.0)
    base.advance(5.0)
    task = asyncio.create_task(keep_ticking(clock))
    await asyncio.sleep(0)
    base.advance(0.5)
    assert clock.now() == 1.5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
