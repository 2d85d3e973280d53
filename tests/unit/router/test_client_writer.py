"""A client that takes its messages in time, late, or never."""

import asyncio
from collections.abc import Callable

import pytest

from cluster.router.client_writer import ClientStalled, ClientWriter


class Client:
    """Takes a message when it is told to."""

    def __init__(self) -> None:
        self.took: list[object] = []
        self.reads = asyncio.Semaphore(0)

    async def take(self, message: object) -> None:
        await self.reads.acquire()
        self.took.append(message)


class Timers:
    """What a writer asks of its event loop; time stands still until told otherwise."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._due: list[asyncio.TimerHandle] = []

    def time(self) -> float:
        return self._now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        self._due.append(asyncio.TimerHandle(when_s, callback, (), asyncio.get_running_loop()))
        return self._due[-1]

    def advance(self, seconds: float) -> None:
        """Whatever falls due meanwhile is called at its time."""
        end_s = self._now_s + seconds
        while ripe := [timer for timer in self._due if timer.when() <= end_s]:
            timer = min(ripe, key=lambda timer: timer.when())
            self._due.remove(timer)
            self._now_s = max(self._now_s, timer.when())
            if not timer.cancelled():
                timer._run()
        self._now_s = end_s


async def test_what_a_client_takes_in_time_passes() -> None:
    client = Client()
    writer = ClientWriter(client.take, 5.0)
    client.reads.release()
    client.reads.release()
    await writer.write("a")
    await writer.write("b")
    writer.close()
    assert client.took == ["a", "b"]


async def test_a_client_that_takes_nothing_has_stalled() -> None:
    client = Client()
    writer = ClientWriter(client.take, 0.02)
    with pytest.raises(ClientStalled):
        await asyncio.wait_for(writer.write("a"), 2)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    writer.close()


async def test_time_counts_from_each_message_anew() -> None:
    client, timers = Client(), Timers()
    writer = ClientWriter(client.take, 1.0)
    writer._loop = timers  # type: ignore[assignment]
    for _ in range(2):  # each waits for a part of what it may, both together for more
        writing = asyncio.create_task(writer.write("a"))
        await asyncio.sleep(0)
        timers.advance(0.6)
        client.reads.release()
        await writing
    writing = asyncio.create_task(writer.write("b"))
    await asyncio.sleep(0)
    timers.advance(0.9)
    await asyncio.sleep(0)
    assert not writing.done()
    timers.advance(0.2)
    with pytest.raises(ClientStalled):
        await asyncio.wait_for(writing, 5)
    writer.close()


async def test_a_pause_of_the_writer_is_no_stall() -> None:
    client = Client()
    writer = ClientWriter(client.take, 0.02)
    client.reads.release()
    await writer.write("a")
    for _ in range(3):
        await asyncio.sleep(0.02)
    client.reads.release()
    await writer.write("b")
    writer.close()
    assert client.took == ["a", "b"]


async def test_somebody_elses_cancellation_stays_one() -> None:
    client = Client()
    writer = ClientWriter(client.take, 0.02)

    async def write() -> None:
        try:
            await writer.write("a")
        finally:
            writer.close()

    task = asyncio.create_task(write())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=2)
    assert task.cancelled()


async def test_a_write_that_waits_can_be_interrupted() -> None:
    client = Client()
    writer = ClientWriter(client.take, 5.0)
    assert not writer.interrupt(ValueError()), "nobody writes"
    writing = asyncio.create_task(writer.write("a"))
    await asyncio.sleep(0)
    assert writer.interrupt(ValueError("enough"))
    with pytest.raises(ValueError, match="enough"):
        await asyncio.wait_for(writing, 1)
    writer.close()
    assert client.took == []
