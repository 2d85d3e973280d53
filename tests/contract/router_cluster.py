"""A router in this process, between real sockets: fake engines on one side, a test on the other."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config.schema import RouterConfig
from cluster.router.service import RunningRouter, serve_router
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from tests.contract.fake_control import FakeControl
from tests.contract.fake_engine import FakeEngine

Metadata = tuple[tuple[str, str], ...]


async def eventually(condition: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    """Waits until ``condition`` holds; the test fails when it does not."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.002)
    assert condition(), what


@dataclass
class Answer:
    """A whole Generate stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    end: inference_pb2.End | None = None
    chunks: int = 0

    @property
    def reason(self) -> str:
        assert self.end is not None
        return inference_pb2.FinishReason.Name(self.end.finish_reason).removeprefix("FINISH_REASON_")


class RouterCluster:
    """Starts and stops everything; ``close`` checks that nothing was lost and nothing is left."""

    def __init__(self, state_file: Path | None = None, **config: Any) -> None:
        settings = {"port": 0, "metrics_port": 0, "drain_deadline_s": 2.0, "engine_silence_s": 5.0, **config}
        self.config = RouterConfig(**settings)
        self.control = FakeControl()
        self.engines: list[FakeEngine] = []
        self.injected = 0
        self._state_file = state_file
        self._before = asyncio.all_tasks()

    async def start(self, *engines: FakeEngine) -> RouterCluster:
        self.engines = [await engine.start() for engine in engines]
        await self.control.start()
        if engines:
            await self.control.push(*(engine.endpoint for engine in self.engines))
        started: asyncio.Future[RunningRouter] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(
            serve_router(self.config, self.control.address, state_file=self._state_file, started=started.set_result)
        )
        await asyncio.wait((started, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            await self._serving
        self.router = started.result()
        self.address = f"127.0.0.1:{self.router.ports['grpc']}"
        self.channel = channel.open_channel(self.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        if engines:
            await self.until_ready(len([e for e in engines if not e.silent and e.claimed_generation is None]))
        return self

    async def until_ready(self, replicas: int) -> None:
        fleet = self.router.fleet
        await eventually(
            lambda: sum(fleet.ready_replicas(m) for m in fleet.models) == replicas, f"{replicas} replicas are ready"
        )

    def call(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0, metadata: Metadata = ()
    ) -> Any:
        self.injected += 1
        return self.stub.Generate(request, timeout=timeout_s, metadata=metadata)

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0, metadata: Metadata = ()
    ) -> Answer:
        answer = Answer()
        async for event in self.call(request, timeout_s, metadata):
            assert answer.end is None, "something came after the End"
            if event.HasField("end"):
                answer.end = event.end
            else:
                answer.chunks += 1
                answer.text += event.chunk.text
                answer.token_ids += event.chunk.token_ids
                answer.logprobs += event.chunk.logprobs
        return answer

    async def complete(self, request: inference_pb2.GenerateRequest) -> inference_pb2.Completion:
        self.injected += 1
        return await self.stub.Complete(request, timeout=20.0)

    async def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.router.ports['metrics']}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()

        return await asyncio.to_thread(read)

    async def outcomes(self) -> dict[str, int]:
        """How many requests ended in which way, of those ways in which some did."""
        found = re.findall(
            r'cluster_router_requests_total\{model="[^"]*",outcome="(\w+)"\} ([\d.]+)', await self.metrics()
        )
        totals: dict[str, int] = {}
        for outcome, count in found:
            totals[outcome] = totals.get(outcome, 0) + int(float(count))
        return {outcome: count for outcome, count in totals.items() if count}

    async def stop_router(self) -> int:
        self.router.stop()
        await asyncio.wait([self._serving], timeout=10)
        if not self._serving.done():
            tasks = {t.get_name(): [f"{f.f_code.co_name}:{f.f_lineno}" for f in t.get_stack()] for t in self._left()}
            raise AssertionError(f"the router does not end: {tasks}, serving {self._serving}")
        return self._serving.result()

    async def close(self) -> None:
        await self.channel.close(0)
        if not self._serving.done():
            await eventually(lambda: self.router.server.active_requests == 0, "every request has ended")
            await eventually(lambda: self.router.fleet.open_sequences == 0, "every sequence was released")
            assert self.router.fleet.outstanding_tokens == 0
            assert sum((await self.outcomes()).values()) == self.injected
            live = [engine for engine in self.engines if not engine.dead.is_set() and not engine.silent]
            await eventually(lambda: not any(engine.running for engine in live), "no engine is left running")
            assert await self.stop_router() == 0
        for engine in self.engines:
            await engine.stop()
        await self.control.stop()
        try:
            await eventually(lambda: not self._left(), "no task is left", 3.0)
        except TimeoutError:
            raise AssertionError(f"left running: {self._left()}") from None

    def watch_callers(self) -> list[tuple[str, str]]:
        """Gets the tenant and the conversation of every call that comes from now on, "" where none is named."""
        server, callers = self.router.server, []
        plain = server._call

        def call(*arguments: Any, **options: Any) -> Any:
            made = plain(*arguments, **options)
            callers.append((made.tenant, made.session_key))
            return made

        server._call = call
        return callers

    def _left(self) -> set[asyncio.Task[Any]]:
        # gRPC's own tasks come and go by themselves; they are compiled coroutines.
        ours = {t for t in asyncio.all_tasks() - self._before if "_cython" not in repr(t.get_coro())}
        return ours - {asyncio.current_task()}


StartCluster = Callable[..., Awaitable[RouterCluster]]
