"""Filters, scorers, picker: who gets a request."""

import random
from dataclasses import replace

import pytest

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Candidate, LiveLoad, supersedes, table_change
from cluster.router.policy.contracts import Demand
from cluster.router.policy.profiles import LEAST_LOAD
from cluster.router.policy.selector import ONLY, choose


def candidate(slot: int, tokens: int = 0, *, model: str = "demo", up: bool = True, **fields: object) -> Candidate:
    endpoint = Endpoint(Incarnation(ReplicaId(model, slot), 1), f"127.0.0.1:{5000 + slot}", "sha256:a", 16)
    return Candidate(replace(endpoint, **fields), up, tokens)


DEMAND = Demand("demo")


def chosen(candidates: list[Candidate], demand: Demand = DEMAND, seed: int = 0) -> int | None:
    choice = choose(LEAST_LOAD, candidates, demand, random.Random(seed))
    return None if choice is None else choice.candidate.endpoint.incarnation.replica.slot


@pytest.mark.parametrize(
    "unfit",
    [
        candidate(0, model="other"),
        candidate(0, up=False),
        candidate(0, draining=True),
        candidate(0, checkpoint_digest="sha256:b"),
    ],
    ids=["model", "down", "draining", "weights"],
)
def test_who_does_not_qualify_is_never_taken(unfit: Candidate) -> None:
    demand = Demand("demo", checkpoint_digest="sha256:a")
    assert chosen([unfit], demand) is None
    assert chosen([unfit, candidate(1, tokens=10**6)], demand) == 1


def test_refused_is_final_and_failed_is_a_preference() -> None:
    both = [candidate(0), candidate(1, tokens=50)]
    first = frozenset({both[0].endpoint.incarnation})
    assert chosen(both, Demand("demo", failed=first)) == 1
    assert chosen(both[:1], Demand("demo", failed=first)) == 0
    assert chosen(both[:1], Demand("demo", refused=first)) is None


def test_the_least_loaded_is_taken() -> None:
    assert chosen([candidate(0, 30), candidate(1, 10), candidate(2, 20)]) == 1


def test_ties_are_broken_by_the_seed_and_shared() -> None:
    equal = [candidate(slot, 7) for slot in range(3)]
    assert chosen(equal, seed=4) == chosen(equal, seed=4)
    assert {chosen(equal, seed=seed) for seed in range(30)} == {0, 1, 2}


def test_the_deciding_scorer_is_named() -> None:
    rng = random.Random(0)
    alone = choose(LEAST_LOAD, [candidate(0)], DEMAND, rng)
    among = choose(LEAST_LOAD, [candidate(0), candidate(1, 5)], DEMAND, rng)
    assert alone is not None
    assert among is not None
    assert (alone.scorer, among.scorer) == (ONLY, "least_load")


def test_live_load_counts_what_is_under_way_and_what_others_sent() -> None:
    load = LiveLoad(block_size=16)
    load.sent(100)
    assert load.tokens == 100
    load.reported(LoadSnapshot(kv_blocks_used=20, queued_prompt_tokens=30))
    assert load.tokens == 350
    load.sent(10)
    assert load.tokens == 360
    load.reported(LoadSnapshot())
    assert load.tokens == 110
    load.ended(100)
    load.ended(10)
    assert load.tokens == 0
    with pytest.raises(AssertionError):
        load.ended(1)


def test_epochs_only_grow() -> None:
    assert supersedes(EndpointTable(3), None)
    assert supersedes(EndpointTable(3), EndpointTable(3))
    assert not supersedes(EndpointTable(2), EndpointTable(3))


def test_a_table_opens_closes_and_updates() -> None:
    kept, gone, moved, drained = (candidate(slot).endpoint for slot in range(4))
    new = candidate(9).endpoint
    moved_now, drained_now = replace(moved, address="127.0.0.1:1"), replace(drained, draining=True)
    change = table_change((kept, gone, moved, drained), EndpointTable(2, (kept, moved_now, drained_now, new)))
    assert set(change.opened) == {moved_now, new}
    assert set(change.closed) == {gone, moved}
    assert change.updated == (drained_now,)
