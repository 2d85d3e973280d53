"""One run of load against one address, in a process of its own: JSON in on standard input, JSON out.

Open loop: requests leave when they are due, whether or not the others are back. The processes whose cost is looked at
are named by pid; their CPU time (user and system, all threads) is read from /proc at both ends of the measured part.
Times are of CLOCK_MONOTONIC, in whose multiples of the pace the mocks tick: a token's lateness is the time since its
tick.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import uvloop

from cluster.v1 import inference_pb2
from cluster.wire import channel
from ops.bench.router.mock_replica import MODEL, prompt_text

TICKS = os.sysconf("SC_CLK_TCK")
CHANNELS = 8  # connections of a gRPC client: idle streams in their thousands share them
START_DEADLINE_S = 60.0
LONG = 900_000  # tokens of a stream that is ended by the clock


class LoadError(Exception):
    """The run says nothing about the contender."""


def cpu_s(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def resident_bytes(pids: list[int]) -> int:
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


class Client(Protocol):
    """One way to ask for tokens."""

    async def whole(self, how: tuple[int, int]) -> None: ...

    def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        """The number of tokens of each message as it comes."""
        ...

    async def close(self) -> None: ...


class GrpcClient:
    """cluster.v1.Inference; prompts and answers as text, or as token ids."""

    def __init__(self, address: str, *, ids: bool, application: str = "") -> None:
        options = (("grpc.use_local_subchannel_pool", 1), *channel.CHANNEL_OPTIONS)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CHANNELS)]
        encode = inference_pb2.GenerateRequest.SerializeToString
        name = "/cluster.v1.Inference/"
        self._whole = [
            c.unary_unary(name + "Complete", encode, inference_pb2.Completion.FromString) for c in self._channels
        ]
        self._stream = [
            c.unary_stream(name + "Generate", encode, inference_pb2.GenerateResponse.FromString) for c in self._channels
        ]
        self._ids, self._turn, self._asked = ids, 0, 0
        self._metadata = (("application", application),) if application else None

    def _request(self, how: tuple[int, int], tokens: int) -> inference_pb2.GenerateRequest:
        self._asked += 1
        name = f"{self._asked:032x}"  # as long as those of cluster.client, which names its requests, too
        request = inference_pb2.GenerateRequest(model=MODEL, request_id=name, return_token_ids=self._ids)
        request.sampling.max_tokens = tokens
        request.sampling.seed = 1
        if self._ids:
            request.token_ids.ids.extend(how)
        else:
            request.text = prompt_text(*how)
        self._turn = (self._turn + 1) % len(self._channels)
        return request

    async def whole(self, how: tuple[int, int]) -> None:
        request = self._request(how, 1)
        answer = await self._whole[self._turn](request, metadata=self._metadata)
        if answer.usage.generated_tokens != 1:
            raise LoadError(f"not one token: {answer}")

    async def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        request = self._request(how, tokens)
        async for event in self._stream[self._turn](request, metadata=self._metadata):
            if event.HasField("chunk"):
                yield len(event.chunk.token_ids) if self._ids else len(event.chunk.text)

    async def close(self) -> None:
        for opened in self._channels:
            await opened.close(0)


class HttpClient:
    """POST /v1/completions over kept connections; only as much HTTP as the mocks and routers speak."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._streaming: set[asyncio.StreamWriter] = set()

    async def _send(self, how: tuple[int, int], tokens: int, *, stream: bool) -> Any:
        body = json.dumps(
            {"model": MODEL, "prompt": prompt_text(*how), "max_tokens": tokens, "stream": stream}
        ).encode()
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        connection[1].write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await connection[0].readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise LoadError(head.decode())
        return connection, head.lower()

    async def whole(self, how: tuple[int, int]) -> None:
        connection, head = await self._send(how, 1, stream=False)
        if b"content-length:" in head:
            await connection[0].readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            await connection[0].readuntil(b"0\r\n\r\n")
        self._idle.append(connection)

    async def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        connection, _ = await self._send(how, tokens, stream=True)
        reader, writer = connection
        self._streaming.add(writer)
        ended = False
        try:
            kept = b""
            while not ended:
                data = await reader.read(65536)
                if not data:
                    raise LoadError("the connection ended within a stream")
                seen = kept + data
                ended = b"0\r\n\r\n" in seen[-7:]
                found = seen.count(b'"text":"x"')
                cut = seen.rfind(b'"text":"x"')
                kept = (seen[cut + 10 :] if cut >= 0 else seen)[-256:]
                if found:
                    yield found
        finally:
            self._streaming.discard(writer)
            if ended:
                self._idle.append(connection)
            else:
                writer.close()

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        for writer in self._streaming:
            writer.close()


@dataclass
class Seen:
    """What came back while it counted."""

    counting: bool = False
    tokens: int = 0
    messages: int = 0
    lateness_s: list[float] = field(default_factory=list)


async def requests(client: Client, scenario: dict, pids: list[int]) -> dict:
    """Requests of one token, arriving at random: cost of each, and time until its answer."""
    rng, rate, seconds = random.Random(scenario["seed"]), scenario["rate"], scenario["seconds"]
    how, stream = (0, 0), scenario["kind"] == "short"
    taken: list[float] = []
    waiting: set[asyncio.Task[None]] = set()

    async def one(due_s: float) -> None:
        if stream:
            async for _ in client.stream(how, 1):
                pass
        else:
            await client.whole(how)
        taken.append(time.monotonic() - due_s)

    async def phase(length_s: float) -> int:
        taken.clear()
        due_s, sent = time.monotonic(), 0
        end_s = due_s + length_s
        while (due_s := due_s + rng.expovariate(rate)) < end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(one(due_s))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            sent += 1
        if waiting:
            await asyncio.wait_for(asyncio.gather(*waiting), START_DEADLINE_S)
        return sent

    await phase(scenario["warm_up_s"])
    before = cpu_s(pids)
    sent = await phase(seconds)
    spent = cpu_s(pids) - before
    return {"requests": sent, "cpu_us_per_request": 1e6 * spent / sent, "latency_s": taken}


async def closed(client: Client, scenario: dict, pids: list[int]) -> dict:
    """Requests of one token, each client's next one when its last is back: how many a second, and the cost of each."""
    done, over = 0, False

    async def one() -> None:
        nonlocal done
        while not over:
            await client.whole((0, 0))
            done += 1

    running = [asyncio.create_task(one()) for _ in range(scenario["clients"])]
    await asyncio.sleep(scenario["warm_up_s"])
    before, began_s, began = [cpu_s([pid]) for pid in pids], time.monotonic(), done
    await asyncio.sleep(scenario["seconds"])
    spent = [cpu_s([pid]) - was for pid, was in zip(pids, before, strict=True)]
    wall_s, requests_done, over = time.monotonic() - began_s, done - began, True
    await asyncio.wait_for(asyncio.gather(*running), START_DEADLINE_S)
    if not requests_done:
        raise LoadError("no request came back")
    return {
        "requests": requests_done,
        "requests_s": requests_done / wall_s,
        "cores": sum(spent) / wall_s,
        "busiest_share": max(spent) / sum(spent),
        "cpu_us_per_request": 1e6 * sum(spent) / requests_done,
    }


async def streams(client: Client, scenario: dict, pids: list[int]) -> dict:
    """Many streams at one pace, looked at while all of them run: cost of each token, and how late it came."""
    count, pace_ms = scenario["streams"], scenario["pace_ms"]
    seen, started = Seen(), asyncio.Semaphore(0)

    async def one() -> None:
        first = True
        async for tokens in client.stream((pace_ms, 0), LONG):
            if first:
                first = False
                started.release()
            if seen.counting:
                seen.tokens += tokens
                seen.messages += 1
                if pace_ms:
                    seen.lateness_s.append(time.monotonic() % (pace_ms / 1e3))

    running = [asyncio.create_task(one()) for _ in range(count)]
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            for _ in range(count):
                await started.acquire()
    except TimeoutError:
        raise LoadError(f"not every stream had its first token within {START_DEADLINE_S:.0f} s") from None
    await asyncio.sleep(scenario["warm_up_s"])
    before, began_s = cpu_s(pids), time.monotonic()
    seen.counting = True
    await asyncio.sleep(scenario["seconds"])
    seen.counting = False
    spent, wall_s = cpu_s(pids) - before, time.monotonic() - began_s
    broken = [task for task in running if task.done()]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    if broken or not seen.tokens:
        raise _ended_early(broken, count)
    return {
        "tokens": seen.tokens,
        "tokens_s": seen.tokens / wall_s,
        "offered_tokens_s": count * 1e3 / pace_ms if pace_ms else None,
        "tokens_per_message": seen.tokens / seen.messages,
        "cores": spent / wall_s,
        "cpu_us_per_token": 1e6 * spent / seen.tokens,
        "latency_s": seen.lateness_s,
    }


def _ended_early(broken: list[asyncio.Task[None]], count: int) -> LoadError:
    why = [" ".join(str(task.exception()).split()) for task in broken[:1] if not task.cancelled()]
    return LoadError(f"{len(broken)} of {count} streams ended early: {why}")


async def idle(client: Client, scenario: dict, pids: list[int]) -> dict:
    """Streams whose first token does not come: memory of each, and what they cost while nothing happens."""
    count = scenario["streams"]
    await client.whole((0, 0))
    before = resident_bytes(pids)

    async def one() -> None:
        async for _ in client.stream((0, 600_000), LONG):
            raise LoadError("a token came")

    running = []
    for _ in range(count):
        running.append(asyncio.create_task(one()))
        if len(running) % 100 == 0:
            await asyncio.sleep(0.1)
    await asyncio.sleep(scenario["settle_s"])
    opened = resident_bytes(pids)
    before_s = cpu_s(pids)
    await asyncio.sleep(scenario["seconds"])
    spent = cpu_s(pids) - before_s
    broken = [task for task in running if task.done()]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await asyncio.sleep(scenario["settle_s"])
    if broken:
        raise _ended_early(broken, count)
    return {
        "streams": count,
        "bytes_per_stream": (opened - before) / count,
        "bytes_per_stream_after": (resident_bytes(pids) - before) / count,
        "cores": spent / scenario["seconds"],
    }


KINDS = {"unary": requests, "short": requests, "closed": closed, "streams": streams, "idle": idle}


async def run(config: dict) -> dict:
    client: Client
    if config["protocol"] == "http":
        client = HttpClient(config["address"])
    else:
        client = GrpcClient(
            config["address"], ids=config["protocol"] == "grpc_ids", application=config.get("application", "")
        )
    try:
        return await KINDS[config["scenario"]["kind"]](client, config["scenario"], config["pids"])
    finally:
        await client.close()


def main() -> None:
    json.dump(uvloop.run(run(json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
