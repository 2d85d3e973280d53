"""Whether an event loop runs, as a thread sees it."""

import asyncio

from cluster.domain.clock import ManualClock
from cluster.router import loop_beat
from cluster.router.loop_beat import LATE_S, LoopBeat


async def test_a_loop_that_runs_nothing_is_late_until_it_runs_again(monkeypatch) -> None:
    monkeypatch.setattr(loop_beat, "BEAT_S", 0.001)
    clock = ManualClock()
    beat = LoopBeat(clock)
    assert beat.page().status == 200
    clock.advance(LATE_S - 0.01)
    assert beat.page().status == 200
    clock.advance(0.01)  # and the loop has had no turn
    assert (beat.page().status, beat.page().body) == (503, b"no beat for 5.0 s\n")
    async with asyncio.timeout(5):
        while beat.page().status != 200:
            await asyncio.sleep(0.001)
    beat.close()
    await asyncio.sleep(0.01)
    clock.advance(LATE_S)
    await asyncio.sleep(0.01)
    assert beat.page().status == 503, "closed, it leaves no mark"
