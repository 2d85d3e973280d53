"""A router that is sent nonsense: nothing crashes, nothing is INTERNAL, nothing is left behind, every request counts.

A failing case names the call that makes it again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from h2.events import RequestReceived

from cluster.router.inference_service import DECODERS, inference_handlers
from cluster.v1 import inference_pb2
from cluster.wire.http2.connection import Connection
from cluster.wire.http2.headers import NotGrpc, call_head
from cluster.wire.http2.messages import CallRefused
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.fuzzing import HEADERS, connection_case, message_case
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
NEXT = hashed_token(340)
REQUESTS = (b"/cluster.v1.Inference/Generate", b"/cluster.v1.Inference/Complete")
MB = 2**20
TOGETHER = 256  # messages at a time
MESSAGES, CONNECTIONS, PARTS = 92_160, 240, 40
CONNECTED = 20  # at a time
PACE_S = 0.01  # a connection that breaks takes with it what has not been looked at
LONG_MESSAGES, LONG_CONNECTIONS = 4, 10  # times as many with --long
# gRPC's own words: of metadata, and of a connection that broke before its answer was written.
TRANSPORT_SAYS = ("Invalid encoding on", "ExecuteBatchError raised in core")
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class Ended(Exception):  # noqa: N818
    """A call that got a status."""


class Context:
    """A call without a transport. What is written must be a message that can be sent."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        assert all(len(value) <= 256 for _, value in metadata)

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        assert all(len(value) <= 256 for _, value in metadata)

    async def write(self, message: Any) -> None:
        assert message.SerializeToString()

    async def abort_with_status(self, status: Any) -> None:
        self.code = status.code
        assert "\n" not in status.details
        assert len(status.details) < 2000, "a status is a header, and headers are bounded"
        raise Ended


class Complaints(logging.Handler):
    """What nobody caught: errors in logs, and exceptions that reached the event loop."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if not said.startswith(TRANSPORT_SAYS):
            self.said.append(said)

    def caught(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.said.append(repr(context))


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    found = Complaints()
    logging.getLogger().addHandler(found)
    yield found
    logging.getLogger().removeHandler(found)


@pytest.fixture
async def cluster(complaints: Complaints) -> AsyncIterator[RouterCluster]:
    files = small_tokenizers.files(small_tokenizers.byte_level())
    engine = FakeEngine(
        NEXT, vocab_size=340, max_model_len=32, tokens_per_step=32, tokenizer_files=files,
        default_sampling=inference_pb2.Sampling(max_tokens=4),
    )  # fmt: skip
    asyncio.get_running_loop().set_exception_handler(complaints.caught)
    started = await RouterCluster(client_stall_s=2.0).start(engine)
    yield started
    await started.channel.close(0)
    await eventually(lambda: started.router.server.active_requests == 0, "every request has ended", 20)
    outcomes = await started.outcomes()
    assert "failed_internal" not in outcomes, outcomes
    await started.close()
    gc.collect()
    assert complaints.said == []


async def still_serves(cluster: RouterCluster) -> None:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5]), sampling=inference_pb2.Sampling(max_tokens=5, seed=2),
        return_token_ids=True,
    )  # fmt: skip
    assert (await cluster.generate(request)).token_ids == expected_tokens(NEXT, [5], 2, 5)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_messages_of_every_kind(cluster: RouterCluster, pytestconfig: pytest.Config) -> None:
    handlers = inference_handlers(cluster.router.server)
    codes: Counter[str] = Counter()
    count = MESSAGES * (LONG_MESSAGES if pytestconfig.getoption("--long") else 1)

    async def send(seed: int) -> None:
        case = message_case(seed)
        context = Context(case.metadata)
        try:
            async with asyncio.timeout(20):
                answer = await handlers[case.method](DECODERS[case.method](case.raw), context)
            assert answer is None or answer.SerializeToString() is not None
        except Ended:
            pass
        except Exception as error:
            raise AssertionError(f"message_case({seed}): {error!r}") from error
        assert context.code not in NEVER, f"message_case({seed}): {context.code}"
        codes[context.code.name if context.code else "OK"] += 1
        cluster.injected += case.method in ("Generate", "Complete")

    most = 0
    for start in range(0, count, TOGETHER):
        await asyncio.gather(*(send(seed) for seed in range(start, start + TOGETHER)))
        if not most and start >= MESSAGES // 4:
            most = resident() + 100 * MB

    # UNAVAILABLE: nobody serves the checkpoint that they want to go on with.
    assert set(codes) == {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE"}
    assert min(codes.values()) > 500, codes
    assert resident() < most
    await still_serves(cluster)


async def test_frames_of_every_kind(
    cluster: RouterCluster, complaints: Complaints, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = CONNECTIONS * (LONG_CONNECTIONS if pytestconfig.getoption("--long") else 1)
    entered = 0  # calls of Generate and Complete, whatever became of them
    plain = Connection._request

    def arrives(self: Connection, event: RequestReceived) -> None:
        nonlocal entered
        entered += is_request(event)
        plain(self, event)

    # Connections take it from their class when they begin.
    monkeypatch.setattr(Connection, "_request", arrives)
    port = cluster.router.ports["grpc"]
    sent = answered = 0

    async def an_arrival() -> None:
        before = entered
        with suppress(TimeoutError):
            async with asyncio.timeout(PACE_S):
                while entered == before:
                    await asyncio.sleep(0.001)

    async def connect(seed: int, settled: asyncio.Event) -> None:
        nonlocal sent, answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading = asyncio.create_task(swallow(reader))
        try:
            for part in connection_case(seed, PARTS):
                if reading.done():
                    break
                sent += 1
                writer.write(part)
                await writer.drain()
                if part[3] == HEADERS:
                    await an_arrival()
            if seed % 3 == 0:
                writer.write_eof()  # half-closed
            await settled.wait()
        except OSError:
            pass  # it was ended, as it deserved
        finally:
            writer.close()
            answered += await reading

    async def together(seeds: Iterable[int]) -> list[str]:
        """Connections at the same time, until they and what they asked for are over; what is wrong then."""
        settled = asyncio.Event()
        ends = await asyncio.gather(
            settle(settled), *(connect(seed, settled) for seed in seeds), return_exceptions=True
        )
        wrong = [repr(end) for end in ends if end is not None]
        try:
            await still_serves(cluster)
        except (AssertionError, grpc.aio.AioRpcError) as error:
            wrong.append(f"it serves no more: {error!r}")
        failures = (await cluster.outcomes()).get("failed_internal", 0)
        wrong += [f"failed_internal {failures}"] * (failures > internal)
        wrong += complaints.said
        return wrong

    async def settle(settled: asyncio.Event) -> None:
        """Until nothing more arrives."""
        before, quiet = -1, 0
        while quiet < 3:
            await asyncio.sleep(0.03)
            quiet = quiet + 1 if before == entered else 0
            before = entered
        settled.set()

    await still_serves(cluster)
    files = open_files()
    most = internal = 0
    for start in range(0, count, CONNECTED):
        seeds = range(start, start + CONNECTED)
        if wrong := await together(seeds):
            complaints.said, alone = [], {}
            for seed in seeds:
                internal = (await cluster.outcomes()).get("failed_internal", 0)
                alone[f"connection_case({seed}, {PARTS})"] = await together([seed])
                complaints.said = []
            cluster.injected = entered
            culprits = {case: what for case, what in alone.items() if what}
            pytest.fail(f"connections {seeds}, {PARTS} parts each: {wrong}; alone: {culprits or 'none of them'}")
        if not most and start >= CONNECTIONS // 4:
            most = resident() + 100 * MB
    await still_serves(cluster)
    await eventually(lambda: cluster.router.server.active_requests == 0, "every request has ended", 20)
    await eventually(lambda: open_files() <= files + 8, "the sockets are closed", 20)
    cluster.injected = entered
    assert resident() < most
    assert answered > sent
    assert sent > count * PARTS / 4, "connections live for a while"
    assert cluster.injected > 500, "calls arrive"


def is_request(event: RequestReceived) -> bool:
    """Whether it is a gRPC call of Generate or Complete, good or bad."""
    with suppress(CallRefused):
        try:
            call_head(event.headers)
        except NotGrpc:
            return False
    return dict(event.headers).get(b":path") in REQUESTS


async def swallow(reader: asyncio.StreamReader) -> int:
    count = 0
    with suppress(OSError):
        while chunk := await reader.read(65_536):
            count += len(chunk)
    return count
