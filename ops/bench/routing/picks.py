"""What one pick costs: the production selector and index over a group of any size, without sockets."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.domain.endpoint import LoadSnapshot
from cluster.router.endpoint_table import Standing
from cluster.router.policy.contracts import Demand, Profile
from cluster.router.policy.group import Group
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.policy.selector import Selector
from cluster.router.prefix_index import PrefixIndex
from cluster.v1 import engine_pb2
from ops.bench.routing.replica import Hardware, SimulatedReplica
from ops.bench.routing.simulation import DIGEST, Seat
from ops.bench.routing.traces import BLOCK_SIZE

SYSTEM_PROMPT_TOKENS = 320  # that every endpoint holds
PROMPT_TOKENS = 800
# Of each two endpoints in a degraded fleet: whether it has room, and its standing.
DEGRADED = {
    "none": ((False, Standing.HEALTHY), (False, Standing.HEALTHY)),
    "slow": ((True, Standing.SLOW), (True, Standing.SLOW)),
    "halfslow": ((False, Standing.HEALTHY), (True, Standing.SLOW)),
    "ejected": ((False, Standing.HEALTHY), (True, Standing.EJECTED)),
}
SITUATIONS = ("idle", "shared", "full", *DEGRADED)
FULL = 200  # sequences, of which an endpoint has less than that many slots


@dataclass(frozen=True)
class Cost:
    """Microseconds of one pick, names of the prompt's blocks included."""

    p50_us: float
    p99_us: float
    first_us: float  # the first pick behind a change of the endpoint table, the group's own gathering excluded


def _seats(endpoints: int, situation: str, rng: random.Random) -> list[Seat]:
    """``shared``: loads are spread; ``full``: of a hundred endpoints, one has room; for the others see DEGRADED."""
    seats = [Seat(SimulatedReplica(slot, Hardware())) for slot in range(endpoints)]
    for number, seat in enumerate(seats):
        running = rng.randrange(40) if situation != "idle" else 0
        if situation == "full" and number % 100:
            running = 100
        if situation in DEGRADED:
            has_room, seat.standing = DEGRADED[situation][number % 2]
            running = running if has_room else FULL
        seat.load.reported(
            LoadSnapshot(
                running_sequences=running,
                queued_prompt_tokens=rng.randrange(2000) if running else 0,
                kv_blocks_used=running * 60,
                kv_blocks_total=6000,
            )
        )
    return seats


def _index(seats: Sequence[Seat], system: tuple[int, ...], situation: str) -> PrefixIndex:
    """``idle``: nobody holds anything; otherwise everybody the system prompt."""
    index = PrefixIndex()
    names = list(PromptBlocks(system).leading(BLOCK_SIZE)) if situation != "idle" else []
    for seat in seats:
        events = engine_pb2.BlockEvents(sequence_number=1, reset=True, complete=True, stored=names)
        assert index.apply(seat.incarnation, events)
    return index


def pick_cost(profile: Profile, endpoints: int, situation: str, picks: int = 2000, seed: int = 0) -> Cost:
    """Times ``picks`` picks of different prompts that begin alike, in CPU time; load moves with each."""
    rng = random.Random(seed)
    seats = _seats(endpoints, situation, rng)
    system = tuple(rng.randrange(100_000) for _ in range(SYSTEM_PROMPT_TOKENS))
    index = _index(seats, system, situation)
    selector, group = Selector(profile, rng), Group(seats, BLOCK_SIZE)
    by_incarnation = {seat.incarnation: seat for seat in seats}
    prompts = [
        system + tuple(rng.randrange(100_000) for _ in range(PROMPT_TOKENS - SYSTEM_PROMPT_TOKENS))
        for _ in range(picks)
    ]
    taken_us = []
    gc.collect()
    gc.disable()
    for number, prompt in enumerate(prompts):
        blocks = PromptBlocks(prompt)
        demand = Demand(
            "demo", DIGEST, needs_room=True, prompt_tokens=len(prompt), blocks=blocks, session_key=str(number)
        )
        began_ns = time.thread_time_ns()
        choice = selector.choose(group, demand, index.holders(blocks.leading(BLOCK_SIZE)))
        taken_us.append((time.thread_time_ns() - began_ns) / 1e3)
        if choice is None:
            assert situation in DEGRADED, "somebody had room"
            continue
        load = by_incarnation[choice.candidate.endpoint.incarnation].load
        load.sent(PROMPT_TOKENS, choice.candidate.cached_tokens)
        load.ended(PROMPT_TOKENS)
        load.reported(load.snapshot)
    gc.enable()
    first_us = taken_us[0]
    taken_us.sort()
    return Cost(taken_us[len(taken_us) // 2], taken_us[len(taken_us) * 99 // 100], first_us)
