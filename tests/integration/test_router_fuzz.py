"""A router that is sent nonsense: nothing crashes, nothing is INTERNAL, nothing is left behind, every request counts.

A failing case names the call that makes it again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from cluster.router.inference_service import DECODERS, inference_handlers
from cluster.v1 import inference_pb2
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.fuzzing import HEADERS, connection_case, message_case
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
NEXT = hashed_token(340)
MB = 2**20
TOGETHER = 64  # messages at a time
MESSAGES, CONNECTIONS, PARTS = (
    15_360,
    240,
    40,
)  # with --long ten times as many
CONNECTED = 20  # at a time
PACE_S = 0.01  # a connection that breaks takes with it what has not been looked at
LONG = 10
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

    async def write(self, message: Any) -> None:
        assert message.SerializeToString()

    async def abort_with_status(self, status: Any) -> None:
        self.code = status.code
        assert "\n" not in status.details
        assert len(status.details) < 2000, "a status is a header, and headers are bounded"
        raise Ended


@pytest.fixture
async def cluster(caplog: pytest.LogCaptureFixture) -> Any:
    files = small_tokenizers.files(small_tokenizers.byte_level())
    engine = FakeEngine(NEXT, vocab_size=340, max_model_len=32, tokens_per_step=32, tokenizer_files=files)
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    started = await RouterCluster(client_stall_s=2.0).start(engine)
    with caplog.at_level(logging.ERROR):
        yield started
        await started.channel.close(0)
        await eventually(lambda: started.router.server.active_requests == 0, "every request has ended", 20)
        outcomes = await started.outcomes()
        assert "failed_internal" not in outcomes, outcomes
        await started.close()
    gc.collect()
    assert errors == []
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line for line in said if not line.startswith("Invalid encoding on")] == []  # of metadata: gRPC's own word


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


def cases(config: pytest.Config, count: int) -> int:
    return count * LONG if config.getoption("--long") else count


async def test_messages_of_every_kind(cluster: RouterCluster, pytestconfig: pytest.Config) -> None:
    handlers = inference_handlers(cluster.router.server)
    codes: Counter[str] = Counter()

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
    for start in range(0, cases(pytestconfig, MESSAGES), TOGETHER):
        await asyncio.gather(*(send(seed) for seed in range(start, start + TOGETHER)))
        if not most and start >= MESSAGES // 4:
            most = resident() + 100 * MB

    assert set(codes) == {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert min(codes.values()) > 500, codes
    assert resident() < most
    await still_serves(cluster)


async def test_frames_of_every_kind(
    cluster: RouterCluster, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = 0
    before = cluster.router.server._call

    def call(*args: Any, counted: bool = True, **options: Any) -> Any:
        nonlocal entered
        entered += counted
        return before(*args, counted=counted, **options)

    def undecodable() -> None:
        nonlocal entered
        entered += 1
        count_undecodable()

    count_undecodable = cluster.router.server.count_undecodable
    monkeypatch.setattr(cluster.router.server, "_call", call)
    monkeypatch.setattr(cluster.router.server, "count_undecodable", undecodable)
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
    most = 0
    for start in range(0, cases(pytestconfig, CONNECTIONS), CONNECTED):
        settled = asyncio.Event()
        seeds = range(start, start + CONNECTED)
        await asyncio.gather(settle(settled), *(connect(seed, settled) for seed in seeds))
        if start % 400 == 0:
            await still_serves(cluster)
        if not most and start >= CONNECTIONS // 4:
            most = resident() + 100 * MB
    await still_serves(cluster)
    await eventually(lambda: cluster.router.server.active_requests == 0, "every request has ended", 20)
    await eventually(lambda: open_files() <= files + 8, "the sockets are closed", 20)
    cluster.injected = entered
    assert resident() < most
    assert answered > sent
    assert sent > cases(pytestconfig, CONNECTIONS) * PARTS / 4, "connections live for a while"
    assert cluster.injected > 500, "calls arrive"


async def swallow(reader: asyncio.StreamReader) -> int:
    count = 0
    with suppress(OSError):
        while chunk := await reader.read(65_536):
            count += len(chunk)
    return count
