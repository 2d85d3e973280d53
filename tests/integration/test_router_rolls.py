"""Another checkpoint takes over while requests wait: nobody waits for those who leave, or is lost with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from cluster.v1 import inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
OLD_NEXT, NEW_NEXT = hashed_token(300), hashed_token(200)
TOKENS = 4
PROMPT, SEED = (1, 2), 3


def old() -> FakeEngine:
    """With few places, and busy for long."""
    return FakeEngine(OLD_NEXT, slot=0, digest="sha256:old", max_num_seqs=1, step_s=0.05)


def new(places: int) -> FakeEngine:
    return FakeEngine(NEW_NEXT, slot=1, digest="sha256:new", max_num_seqs=places, step_s=0.01)


def request(max_tokens: int = TOKENS, **fields: object) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.Sampling(max_tokens=max_tokens, seed=SEED)
    ids = inference_pb2.TokenIds(ids=PROMPT)
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling, return_token_ids=True, **fields)


class Roll:
    """``running`` are at the old replica, ``waiting`` stand in line for it."""

    def __init__(self) -> None:
        self.cluster = RouterCluster()
        self.running: list[asyncio.Task[object]] = []
        self.waiting: list[asyncio.Task[object]] = []

    async def begin(self, *waiting: inference_pb2.GenerateRequest) -> FakeEngine:
        first = old()
        await self.cluster.start(first)
        self.running = [asyncio.create_task(self.cluster.generate(request(200))) for _ in range(2)]
        await eventually(lambda: len(first.submits) == 2, "the old one has what it takes")
        self.waiting = [asyncio.create_task(self.cluster.generate(one)) for one in waiting]
        desk = self.cluster.router.server._around.desk
        await eventually(lambda: sum(len(x.waiting) for x in desk._lines.values()) == len(waiting), "the others wait")
        return first

    async def come(self, places: int = 4) -> FakeEngine:
        """The new replica comes up."""
        taking_over = await new(places).start()
        self.cluster.engines.append(taking_over)
        await self.cluster.control.push(self.cluster.engines[0].endpoint, taking_over.endpoint)
        await self.cluster.until_ready(2)
        return taking_over

    async def drain(self) -> None:
        """The old one takes nothing any more."""
        first, taking_over = self.cluster.engines
        await self.cluster.control.push(replace(first.endpoint, draining=True), taking_over.endpoint)


@pytest.fixture
async def roll() -> AsyncIterator[Roll]:
    made = Roll()
    yield made
    for task in (*made.running, *made.waiting):
        task.cancel()
    await asyncio.gather(*made.running, *made.waiting, return_exceptions=True)
    await made.cluster.close()


@pytest.mark.parametrize("drains", [False, True])
async def test_who_waits_for_the_old_one_goes_to_the_new_one(roll: Roll, drains: bool) -> None:
    first = await roll.begin(*(request(priority=-1) for _ in range(10)))
    taking_over = await roll.come(1 if drains else 4)
    if drains:  # there is room for few of them
        await roll.drain()
    async with asyncio.timeout(8):
        answers = await asyncio.gather(*roll.waiting)
    assert [answer.token_ids for answer in answers] == [expected_tokens(NEW_NEXT, PROMPT, SEED, TOKENS)] * 10
    assert (len(first.submits), len(taking_over.submits)) == (2, 10)
    assert not any(task.done() for task in roll.running), "who runs goes on"


async def test_what_has_tokens_of_the_old_one_does_not_go_to_the_new_one(roll: Roll) -> None:
    began = request(8, generated_token_ids=expected_tokens(OLD_NEXT, PROMPT, SEED, 2), checkpoint_digest="sha256:old")
    await roll.begin(began, request())
    await roll.come()
    other = await roll.cluster.generate(request())
    assert other.token_ids == expected_tokens(NEW_NEXT, PROMPT, SEED, TOKENS), "newcomers wait for nobody"
    assert not roll.waiting[0].done()
    await roll.drain()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(roll.waiting[0], 8)
    code, reason, *_ = from_rpc_error(caught.value)
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENDPOINT")
    assert (await asyncio.wait_for(roll.waiting[1], 8)).token_ids == expected_tokens(NEW_NEXT, PROMPT, SEED, TOKENS)
    assert len(roll.cluster.engines[0].submits) == 2


async def test_the_line_of_the_old_one_refuses_nobody_for_the_new_one(roll: Roll) -> None:
    """Deadlines are met where there is room, however long those of another checkpoint wait."""
    pinned = [request(8, generated_token_ids=expected_tokens(OLD_NEXT, PROMPT, SEED, 2)) for _ in range(80)]
    await roll.begin(*pinned)
    taking_over = await roll.come()
    answers = await asyncio.gather(*(roll.cluster.generate(request(), timeout_s=2.0) for _ in range(12)))
    assert [answer.token_ids for answer in answers] == [expected_tokens(NEW_NEXT, PROMPT, SEED, TOKENS)] * 12
    assert len(taking_over.submits) == 12


async def test_no_more_move_than_find_a_place(roll: Roll) -> None:
    """The rest keeps its places in the line, and goes wherever there is room first."""
    await roll.begin(*(request(40) for _ in range(30)))
    taking_over = await roll.come()
    desk = roll.cluster.router.server._around.desk
    await eventually(lambda: len(taking_over.submits) >= 4, "some have moved")
    assert len(desk._lines["demo", "sha256:old"].waiting) >= 20
    async with asyncio.timeout(15):
        answers = await asyncio.gather(*roll.waiting)
    assert {tuple(answer.token_ids) for answer in answers} <= {
        tuple(expected_tokens(which, PROMPT, SEED, 40)) for which in (OLD_NEXT, NEW_NEXT)
    }
