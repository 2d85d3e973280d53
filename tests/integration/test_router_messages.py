"""Messages that hold more than they say, over real sockets: refused in words, and nothing that waits keeps them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from cluster.v1 import inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract import small_tokenizers
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.fuzzing import part
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
MB = 2**20
VOCAB = 340
NEXT = hashed_token(VOCAB)
WAITING = 20
STREAMED = ("Inference/Generate",)
CALLS = (*STREAMED, "Inference/Complete", "Inference/Tokenize", "Routing/ExplainRoute")


@pytest.fixture
async def cluster() -> AsyncIterator[RouterCluster]:
    files = small_tokenizers.files(small_tokenizers.byte_level())
    engine = FakeEngine(NEXT, vocab_size=VOCAB, max_num_seqs=1, tokenizer_files=files)
    started = await RouterCluster(ttft_objective_s=100.0, max_queue_wait_s=200.0).start(engine)
    yield started
    await started.close()


def request(tokens: int, seed: int = 3) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5]), sampling=inference_pb2.Sampling(max_tokens=tokens, seed=seed),
        return_token_ids=True,
    )  # fmt: skip


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


async def send(cluster: RouterCluster, path: str, raw: bytes) -> None:
    made: Any = cluster.channel.unary_stream if path in STREAMED else cluster.channel.unary_unary
    cluster.injected += path in ("Inference/Generate", "Inference/Complete")
    call = made(f"/cluster.v1.{path}", request_serializer=None, response_deserializer=None)(raw, timeout=60)
    if path in STREAMED:
        async for _ in call:
            pass
    else:
        await call


@pytest.mark.parametrize("path", CALLS)
async def test_what_holds_too_much_is_refused_in_words(cluster: RouterCluster, path: str) -> None:
    chat = 3 if path == "Inference/Tokenize" else 5
    cases = {
        "fields such as Chat.messages": part(chat, b"\x0a\x00" * (4 * MB)),
        "bytes of fields that its proto does not have": part(2047, bytes(MB)),
    }
    for what, raw in cases.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(cluster, path, raw)
        code, reason, message, _ = from_rpc_error(caught.value)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID")
        assert what in message
    counted = path in ("Inference/Generate", "Inference/Complete")
    assert await cluster.outcomes() == ({"rejected_invalid": 2} if counted else {})
    assert (await cluster.generate(request(5))).token_ids == expected_tokens(NEXT, [5], 3, 5)


async def test_a_request_that_waits_holds_no_more_than_it_says(cluster: RouterCluster) -> None:
    engine = cluster.engines[0]
    engine.step_s = 600.0
    busy = [asyncio.create_task(cluster.generate(request(10, seed), 600.0)) for seed in range(2)]
    await eventually(lambda: len(engine.submits) == 2, "the engine is full")
    # A prompt that another one has replaced, and fields of no proto.
    raw = part(3, b"x" * 8 * MB) + part(2047, bytes(60_000)) + request(10).SerializeToString()
    before = resident()
    waiting = []
    for number in range(1, WAITING + 1):
        waiting.append(asyncio.create_task(send(cluster, "Inference/Generate", raw)))
        await eventually(lambda: cluster.router.server.active_requests == 2 + number, "it waits")  # noqa: B023
    assert len(engine.submits) == 2
    grown = resident() - before
    for task in (*waiting, *busy):
        task.cancel()
    await asyncio.gather(*waiting, *busy, return_exceptions=True)
    engine.step_s = 0.001
    assert grown < WAITING * 8 * MB / 3, f"{grown / MB:.0f} MB"
