"""A client that takes its messages in time, late, or never."""

import asyncio

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
    client = Client()
    writer = ClientWriter(client.take, 0.6)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for _ in range(2):  # each waits for half of what it may, both together for more
        loop.call_later(0.35, client.reads.release)
        await writer.write("a")
    assert loop.time() - began_s > 0.6
    began_s = loop.time()
    with pytest.raises(ClientStalled):
        await asyncio.wait_for(writer.write("b"), 5)
    assert loop.time() - began_s >= 0.59
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
