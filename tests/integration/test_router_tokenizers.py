"""Tokenizers and the threads that prompts are tokenized in, as replicas and clients of a router meet them."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import grpc.aio
import pytest

from cluster.client import AsyncClient
from cluster.domain.errors import RequestRejected
from cluster.router import tokenizer_cache
from cluster.router.tokenization import Tokenizer
from cluster.router.tokenizer_cache import INLINE_CHARACTERS
from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract import fake_engine, small_tokenizers
from tests.contract.fake_engine import FakeEngine, hashed_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration
NEXT = hashed_token(340)
FILES = small_tokenizers.files(small_tokenizers.byte_level())
LONG = "fox " * INLINE_CHARACTERS


def engine(slot: int = 0) -> FakeEngine:
    return FakeEngine(NEXT, slot=slot, vocab_size=340, tokenizer_files=FILES, max_model_len=100_000)


async def test_a_checkpoints_tokenizer_is_fetched_and_built_once(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, built = [], []
    describe, build = fake_engine._Servicer.Describe, tokenizer_cache._build

    async def counted_describe(self: Any, request: engine_pb2.DescribeRequest, context: Any) -> Any:
        fetched.extend([1] * request.include_tokenizer)
        return await describe(self, request, context)

    def counted_build(files: Mapping[str, bytes]) -> Tokenizer:
        built.append(1)
        return build(files)

    monkeypatch.setattr(fake_engine._Servicer, "Describe", counted_describe)
    monkeypatch.setattr(tokenizer_cache, "_build", counted_build)
    await start(*(engine(slot) for slot in range(8)))
    assert (len(fetched), len(built)) == (1, 1)


async def ending(cluster: RouterCluster, kind: str) -> str:
    """How one call with a long prompt ends for its client."""
    request = inference_pb2.GenerateRequest(text=LONG, sampling=inference_pb2.Sampling(max_tokens=1))
    try:
        if kind == "Generate":
            await cluster.generate(request)
        elif kind == "Complete":
            await cluster.complete(request)
        elif kind == "Tokenize":
            await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text=LONG), timeout=20.0)
        else:
            async with AsyncClient(cluster.address) as client:
                await client.complete(LONG, max_tokens=1)
    except RequestRejected as error:
        return f"UNAVAILABLE {error.reject_reason.name}"
    except grpc.aio.AioRpcError as error:
        code, reason, *_ = from_rpc_error(error)
        return f"{code.name} {reason}"
    return "OK"


async def test_prompts_that_a_stopping_router_has_not_tokenized_go_to_another_one(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start(engine(), drain_deadline_s=0.1)
    held, started = threading.Event(), []
    encode = Tokenizer.encode

    def slow(*arguments: Any, **options: Any) -> list[int]:
        started.append(1)
        assert held.wait(10)
        return encode(*arguments, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    kinds = ("Generate", "Complete", "Tokenize", "client")
    calls = [asyncio.create_task(ending(cluster, kind)) for kind in kinds for _ in range(2)]
    try:
        await eventually(lambda: cluster.router.server.active_requests == len(calls), "all are in")
        await eventually(lambda: len(started) == 2, "the threads are at work, the others wait")
        assert await cluster.stop_router() == 0
        assert await asyncio.gather(*calls) == ["UNAVAILABLE DRAINING"] * len(calls)
    finally:
        held.set()
    assert len(started) == 2


class Context:
    """An engine's side of a session that submits once and then says nothing."""

    def __init__(self, *messages: engine_pb2.SessionRequest) -> None:
        self._messages = list(messages)

    async def read(self) -> engine_pb2.SessionRequest:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def write(self, message: engine_pb2.SessionResponse) -> None: ...


async def test_a_fake_engines_session_that_is_cancelled_twice_leaves_nothing_running() -> None:
    one = FakeEngine(NEXT, vocab_size=340, step_age_s=1.0)
    one.dead = asyncio.Event()
    hello = engine_pb2.Hello(expected=one.identity)
    commands = engine_pb2.Commands(submits=[engine_pb2.Submit(sequence_id=1, prompt_token_ids=[1])])
    context = Context(engine_pb2.SessionRequest(hello=hello), engine_pb2.SessionRequest(commands=commands))
    session = asyncio.create_task(fake_engine._Servicer(one).Session(None, context))
    await eventually(lambda: len(one.running) == 1, "it runs")
    for _ in range(4):
        session.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([session])
    assert one.running == {}
