"""Many streams of one client, and a router that is away for a while: all go on, without a storm. In simulated time."""

import heapq
import random
from collections import Counter

import pytest

from cluster.client.address_memory import AddressMemory
from cluster.client.requests import build_request
from cluster.client.resume_budget import CALLS_PER_S, RESERVE, WAIT_MAX_S, ResumeBudget
from cluster.client.transcript import JITTER, RESUMES_MAX, Transcript
from cluster.domain.errors import RequestRejected
from cluster.v1 import inference_pb2

TOKEN = inference_pb2.Chunk(token_ids=[5])


def calls_until_all_go_on(streams: int, away_s: float, addresses: tuple[str, ...] = ("a",)) -> list[list[float]]:
    """When each of the streams, which all break at 0, has asked; the last time with success."""
    budget, memory, rng = ResumeBudget(), AddressMemory(), random.Random(streams)
    many = [
        Transcript(build_request([1], {}), addresses, budget=budget, memory=memory, rng=rng) for _ in range(streams)
    ]
    for stream in many:
        stream.next_address(-1.0)
        stream.take(TOKEN)
    calls: list[list[float]] = [[] for _ in many]
    due = [(stream.pause_after_s(None, 0.0), which) for which, stream in enumerate(many)]
    heapq.heapify(due)
    while due:
        now_s, which = heapq.heappop(due)
        calls[which].append(now_s)
        many[which].next_address(now_s)
        if now_s < away_s:
            heapq.heappush(due, (now_s + many[which].pause_after_s(None, now_s), which))
        else:
            many[which].take(TOKEN)
    return calls


@pytest.mark.parametrize("addresses", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("away_s", [1.7, 6.0, 13.0])
@pytest.mark.parametrize("streams", [1, 30, 300, 3000])
def test_all_streams_go_on(streams: int, away_s: float, addresses: tuple[str, ...]) -> None:
    calls = calls_until_all_go_on(streams, away_s, addresses)
    assert max(map(len, calls)) <= RESUMES_MAX
    paid = Counter(int(at_s) for of_stream in calls for at_s in of_stream[len(addresses) :])
    long_waits_per_s = streams / (JITTER * WAIT_MAX_S)  # of streams that wait as long as anybody does, spread by chance
    assert max(paid.values(), default=0) <= RESERVE + max(CALLS_PER_S * (1 + JITTER), long_waits_per_s)


def test_streams_wait_the_longer_the_more_they_are_and_never_for_long() -> None:
    last_s = [max(map(max, calls_until_all_go_on(streams, 1.7))) for streams in (30, 300, 3000)]
    assert last_s[0] < 3.5
    assert last_s[1] < 9
    assert last_s[2] < 30


def test_streams_end_when_no_router_comes_back() -> None:
    with pytest.raises(RequestRejected, match="No router answers"):
        calls_until_all_go_on(300, 1000.0)


def test_a_budget_is_earned_by_time_up_to_its_reserve() -> None:
    budget = ResumeBudget(reserve=2, calls_per_s=4.0)
    assert [budget.spend(0.0) for _ in range(3)] == [True, True, False]
    assert [budget.spend(0.3) for _ in range(2)] == [True, False]
    assert [budget.spend(1000.0) for _ in range(3)] == [True, True, False]
    assert not budget.spend(1.0), "a clock that another thread has read earlier"
    assert budget.wait_s(1000.0) == 0.25
    assert budget.wait_s(1000.0) == 0.5
    assert not budget.spend(1000.5)
    assert budget.spend(1000.75)
