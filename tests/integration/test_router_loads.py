"""How often a router lets its replicas send news, over real sockets, while the fleet grows and shrinks."""

from __future__ import annotations

import pytest

from cluster.router.fleet import BLOCK_MESSAGES_PER_S, LOAD_MESSAGES_PER_S
from tests.contract.fake_engine import FakeEngine, hashed_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration


def rates(fakes: list[FakeEngine]) -> tuple[float, float]:
    """Messages a second from all of them together: of blocks, and of loads."""
    last = [fake.pauses[-1] for fake in fakes]
    return sum(1 / blocks for blocks, _ in last), sum(1 / load for _, load in last)


async def tell(cluster: RouterCluster, fakes: list[FakeEngine]) -> None:
    await cluster.control.push(*(fake.endpoint for fake in fakes))
    await cluster.until_ready(len(fakes))


async def test_a_fleet_that_comes_and_goes_one_by_one_sends_no_more_news_than_one_of_its_size(
    start: StartCluster,
) -> None:
    fakes = [FakeEngine(next_token=hashed_token(300), slot=slot) for slot in range(9)]
    cluster = await start(fakes[0])
    cluster.engines += [await fake.start() for fake in fakes[1:]]
    for size in [*range(2, 10), *range(8, 0, -1)]:
        there = fakes[:size]
        await tell(cluster, there)
        await eventually(
            lambda there=there: all(
                most / 2 <= rate <= 2 * most
                for rate, most in zip(rates(there), (BLOCK_MESSAGES_PER_S, LOAD_MESSAGES_PER_S), strict=True)
            ),
            f"{size} endpoints are told to send as many as they may, within a factor of two",
        )
    assert 3 <= len(fakes[0].pauses) <= 8, "it is told when the size has doubled or halved, not at each change"
