"""How cache-aware routers have failed in the field, each as a test of the profiles that know caches."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.router.endpoint_table import Standing
from cluster.router.policy.group import Group
from cluster.router.policy.profiles import PROFILES
from cluster.router.policy.selector import Selector
from tests.unit.router.policy_fleet import BLOCK_SIZE, FakeSeat, demand_for, holders_of, prompt_of

pytestmark = pytest.mark.parametrize("name", ["prefix_aware", "default"])
PROMPT = prompt_of(1600)


def taken(
    name: str, fleet: list[FakeSeat], held: dict[int, int], prompt: tuple[int, ...] = PROMPT, seed: int = 0
) -> int:
    choice = Selector(PROFILES[name], random.Random(seed)).choose(
        Group(fleet, BLOCK_SIZE), demand_for(prompt), holders_of(prompt, held)
    )
    assert choice is not None
    return choice.candidate.endpoint.incarnation.replica.slot


def test_a_miss_goes_to_the_least_loaded_whoever_has_the_smallest_cache(name: str) -> None:
    """A replica that has just come up empty, and is busy, must not get every miss (sglang#14305: "death spiral")."""
    newcomer, others = FakeSeat(0, queued_tokens=9000), [FakeSeat(slot, queued_tokens=50) for slot in range(1, 4)]
    index_of_others = {1: 0, 2: 0, 3: 0}
    for number in range(1, 40):
        assert taken(name, [newcomer, *others], index_of_others, prompt_of(400, number)) != 0


def test_misses_spread_although_nobody_evicts(name: str) -> None:
    fleet, counts = [FakeSeat(slot) for slot in range(4)], Counter[int]()
    for number in range(1, 201):
        slot = taken(name, fleet, {}, prompt_of(400, number), seed=number)
        fleet[slot].queued_tokens += 400
        counts[slot] += 1
    assert max(counts.values()) - min(counts.values()) <= 4


def test_one_hot_endpoint_does_not_switch_affinity_off_for_the_others(name: str) -> None:
    """A threshold on max load - min load does just that (vllm-project/router#238)."""
    hot = FakeSeat(0, queued_tokens=200_000, running_tokens=500_000)
    fleet = [hot, *(FakeSeat(slot, queued_tokens=100) for slot in range(1, 6))]
    for holder in range(1, 6):
        assert taken(name, fleet, {holder: 1584}) == holder
    assert taken(name, fleet, {0: 1584}) != 0


def test_the_idle_load_of_who_gets_nothing_does_not_switch_affinity_off(name: str) -> None:
    """An ejected or full endpoint has no load, and is no yardstick (vllm-project/router#254)."""
    ejected = FakeSeat(0, standing=Standing.EJECTED)
    fleet = [ejected, *(FakeSeat(slot, queued_tokens=1000) for slot in range(1, 5))]
    assert taken(name, fleet, {3: 1584}) == 3
    assert taken(name, fleet, {0: 1584}) != 0


def test_a_popular_prompt_is_copied_when_its_holder_has_a_queue(name: str) -> None:
    """Affinity without load piles everything onto one endpoint (llm-d: 55 % of requests served)."""
    fleet, held, counts = [FakeSeat(slot) for slot in range(4)], {0: 1584}, Counter[int]()
    for number in range(400):
        slot = taken(name, fleet, held, (*PROMPT, 9000 + number, *prompt_of(100, number + 20)), seed=number)
        miss = 100 if slot in held else 1700
        held[slot] = 1584
        fleet[slot].queued_tokens += miss
        counts[slot] += 1
        for seat in fleet:  # all compute, at less than what comes
            seat.queued_tokens = max(0, seat.queued_tokens - 22)
    assert set(held) == {0, 1, 2, 3}
    assert max(seat.queued_tokens for seat in fleet) < 2 * min(seat.queued_tokens for seat in fleet) + 1700
    assert max(counts.values()) < 0.4 * 400


def test_a_short_common_beginning_moves_nobody(name: str) -> None:
    """A chat template that all prompts begin with is worth its few tokens, not a queue."""
    fleet = [FakeSeat(0, queued_tokens=300), FakeSeat(1)]
    assert taken(name, fleet, {0: 32}) == 1


def test_running_sequences_do_not_cost_a_conversation_its_cache(name: str) -> None:
    fleet = [FakeSeat(0, running_tokens=20_000), FakeSeat(1, running_tokens=10_000)]
    assert taken(name, fleet, {0: 1584}) == 0
