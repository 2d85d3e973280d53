"""What a router learns of KV blocks over real sockets: from fake engines (test_replica_processes.py: from a real one)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.domain.block_hash import LeadingNames
from cluster.router.session import EngineSession
from cluster.v1 import engine_pb2, inference_pb2
from tests.contract.fake_engine import BLOCK_SIZE, FakeEngine, hashed_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration

PROMPT = list(range(1, 5 * BLOCK_SIZE + 3))  # five full blocks


def engine(slot: int, **options: Any) -> FakeEngine:
    return FakeEngine(next_token=hashed_token(300), slot=slot, tell_blocks=True, **options)


def known(cluster: RouterCluster, fake: FakeEngine, tokens: list[int], salt: str = "") -> int:
    """Leading blocks of ``tokens`` that the router thinks are there."""
    index = cluster.router.fleet.index_of(fake.endpoint)
    index.check()
    return index.holders(LeadingNames(tokens, BLOCK_SIZE, salt.encode())).get(fake.endpoint.incarnation, 0)


def request(tokens: list[int] = PROMPT, **fields: Any) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.Sampling(max_tokens=3, seed=1)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=tokens), sampling=sampling, **fields)


async def test_a_router_knows_what_is_cached_before_it_came_and_what_changes(start: StartCluster) -> None:
    fakes = [engine(0), engine(1)]
    fakes[0].hold(PROMPT)
    cluster = await start(*fakes)
    await eventually(lambda: known(cluster, fakes[0], PROMPT) == 5, "the account has come")
    assert known(cluster, fakes[1], PROMPT) == 0
    fakes[1].hold(PROMPT[: 2 * BLOCK_SIZE])
    fakes[0].evict(PROMPT, keep=3)
    await eventually(
        lambda: [known(cluster, fake, PROMPT) for fake in fakes] == [3, 2], "news have come from both endpoints"
    )


async def test_a_prompt_that_was_sent_is_known_with_its_salt_only(start: StartCluster) -> None:
    fake = engine(0)
    cluster = await start(fake)
    await cluster.generate(request(cache_salt="tenant"))
    await eventually(lambda: known(cluster, fake, PROMPT, "tenant") == 5, "the prompt is known")
    assert known(cluster, fake, PROMPT) == 0
    assert (await cluster.generate(request(cache_salt="tenant"))).end.usage.cached_prompt_tokens == 5 * BLOCK_SIZE


async def test_a_lost_message_is_noticed_and_everything_is_told_again(start: StartCluster) -> None:
    fake = engine(0)
    cluster = await start(fake)
    fake.hold(PROMPT[:BLOCK_SIZE])
    await eventually(lambda: known(cluster, fake, PROMPT) == 1, "the router listens")
    fake.lose_block_message = True
    fake.hold(PROMPT)
    await eventually(lambda: not fake.lose_block_message, "a message was lost")
    assert known(cluster, fake, PROMPT) == 1
    assert fake.resyncs == 0
    other = list(range(500, 500 + BLOCK_SIZE))
    fake.hold(other)
    await eventually(lambda: known(cluster, fake, PROMPT) == 5, "the account has come again")
    assert known(cluster, fake, other) == 1
    assert fake.resyncs == 1
    metrics = await cluster.metrics()
    assert 'cluster_router_prefix_index_resyncs_total{model="demo"} 1.0' in metrics
    assert 'cluster_router_prefix_index_blocks{model="demo"} 6.0' in metrics


async def test_a_first_message_that_is_lost_is_noticed_too(start: StartCluster) -> None:
    fake = engine(0, lose_block_message=True)
    fake.hold(PROMPT)
    cluster = await start(fake)
    await eventually(lambda: not fake.lose_block_message, "a message was lost")
    fake.hold([7] * BLOCK_SIZE)
    await eventually(lambda: known(cluster, fake, PROMPT) == 5, "the account has come")


async def test_a_session_that_was_broken_tells_anew_and_who_left_the_table_is_forgotten(start: StartCluster) -> None:
    fake, other = engine(0), engine(1)
    fake.hold(PROMPT)
    cluster = await start(fake, other, engine_silence_s=0.3)
    await eventually(lambda: known(cluster, fake, PROMPT) == 5, "the account has come")
    index = cluster.router.fleet.index_of(fake.endpoint)
    fake.silent = True
    await eventually(lambda: cluster.router.fleet.ready_replicas("demo") == 1, "the silent one is down", 5.0)
    fake.evict(PROMPT, keep=2)
    assert known(cluster, fake, PROMPT) == 5, "nobody said otherwise"
    fake.silent = False
    await eventually(lambda: known(cluster, fake, PROMPT) == 2, "the new session has told", 5.0)
    await cluster.control.push(other.endpoint)
    await eventually(lambda: not index.knows(fake.endpoint.incarnation), "the endpoint is forgotten")
    assert index.holders(LeadingNames(PROMPT, BLOCK_SIZE)).depth == 0
    index.check()


async def test_thousands_of_blocks_come_in_small_messages_beside_tokens(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, int]] = []  # names and tokens of each message of the session
    dispatch = EngineSession._dispatch

    def spy(session: EngineSession, message: engine_pb2.SessionResponse) -> None:
        names = len(message.blocks.stored) + len(message.blocks.removed)
        heard.append((names, sum(len(update.token_ids) for update in message.step.sequences)))
        dispatch(session, message)

    monkeypatch.setattr(EngineSession, "_dispatch", spy)
    fake = engine(0, max_model_len=100_000, step_s=0.002)
    cluster = await start(fake)
    sent = request()
    sent.sampling.max_tokens = 50_000
    stream, got = cluster.call(sent), 0
    tokens = [i % 251 for i in range(3000 * BLOCK_SIZE)]
    async for event in stream:
        got += bool(event.chunk.text or event.chunk.token_ids)
        if got == 1:
            heard.clear()
            fake.hold(tokens)
        if known(cluster, fake, tokens) == 3000:
            break
    stream.cancel()
    names = [count for count, _ in heard]
    assert sum(names) >= 3000
    assert max(names) <= 512
    first, last = (names.index(512), max(i for i, count in enumerate(names) if count))
    assert sum(count for _, count in heard[first:last]) >= 3000 // 512, "a token after each message"
    assert got > 1, "the client had some of them meanwhile"


async def test_who_does_not_route_by_prefix_is_told_nothing(start: StartCluster) -> None:
    fake = engine(0)
    fake.hold(PROMPT)
    cluster = await start(fake, policy="least_load")
    await cluster.generate(request())
    assert not fake.blocks.has_readers
    assert known(cluster, fake, PROMPT) == 0


async def test_an_engine_that_tells_nothing_is_served_all_the_same(start: StartCluster) -> None:
    quiet = FakeEngine(next_token=hashed_token(300), slot=0)
    cluster = await start(quiet, engine(1))
    await asyncio.gather(*(cluster.generate(request()) for _ in range(4)))
    assert known(cluster, quiet, PROMPT) == 0
