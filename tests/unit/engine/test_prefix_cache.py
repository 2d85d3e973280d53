from __future__ import annotations

import pytest

from cluster.domain.block_hash import block_hashes
from cluster.domain.model_spec import RopeByLength
from cluster.domain.request import SamplingParams
from cluster.engine import prefix_cache
from cluster.engine.block_pool import BlockPool
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.sequence import Sequence
from cluster.engine.step import SequenceKey
from tests.unit.engine.small_engine import TOKEN, Engine, names

SWITCH = RopeByLength("switch", 10)
DYNAMIC = RopeByLength("dynamic", 10)


def finish(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


def starts_at(engine: Engine) -> dict[int, int]:
    """One step; {name: first computed position}."""
    return {name: start for name, (start, _) in engine.step().items()}


def run_once(engine: Engine, **request: object) -> None:
    engine.submit(900, **request)  # type: ignore[arg-type]
    finish(engine)


# ---- what is found


def test_a_prompt_seen_before_is_computed_from_its_last_block_on() -> None:
    engine = Engine(caching=True)
    run_once(engine, prompt=11, max_tokens=1)
    engine.submit(1, prompt=11, max_tokens=1)
    plan = engine.plan()
    assert (plan.entries[0].start, plan.entries[0].token_ids) == (8, (18, 19, 20))
    assert (plan.entries[0].first_block, len(plan.entries[0].new_block_ids)) == (0, 3)
    (progress,) = engine.commit(plan)
    assert progress.cached_prompt_tokens == 8
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (22, 8)


def test_of_a_prompt_that_is_cached_completely_the_last_block_is_computed_into_one_of_its_own() -> None:
    engine = Engine(caching=True)
    run_once(engine, prompt=12, max_tokens=1)
    engine.submit(1, prompt=12, max_tokens=2)
    plan = engine.plan()
    assert (plan.entries[0].start, len(plan.entries[0].token_ids)) == (8, 4)
    cached = [engine.pool.find(name) for name in block_hashes(range(10, 22), 4)]
    assert list(plan.entries[0].new_block_ids[:2]) == cached[:2]
    assert plan.entries[0].new_block_ids[2] != cached[2]


def test_a_prompt_cached_but_for_one_token_is_a_decode_and_stands_with_them() -> None:
    engine = Engine(caching=True, max_num_seqs=4)
    run_once(engine, prompt=12, max_tokens=1)
    engine.submit(1, prompt=6, first=90)
    engine.submit(2, prompt=13)
    plan = engine.plan()
    assert names(plan) == [2, 1]
    assert [e.is_decode for e in plan.entries] == [True, False]
    engine.commit(plan)
    assert engine.names() == [1, 2]


def test_generated_tokens_are_found_too() -> None:
    engine = Engine(caching=True)
    run_once(engine, prompt=6, max_tokens=8)  # 13 of 14 tokens are computed
    engine.submit(1, prompt=6, resume=7, max_tokens=20)
    assert starts_at(engine) == {1: 12}
    engine.submit(2, prompt=6, resume=8, max_tokens=20)
    assert starts_at(engine)[2] == 12


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    engine = Engine(num_blocks=6, caching=True)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10, first=90)
    for _ in range(6):
        engine.step()
    assert engine.names() == [1]
    assert engine.scheduler.preemptions == 1
    entries: dict[int, tuple[int, int]] = {}
    while 2 not in entries:
        entries = engine.step()
    # Of its 12 computed tokens one block had to go, the last one.
    assert entries[2] == (8, 5)


def test_sequences_that_run_share_what_is_committed() -> None:
    engine = Engine(caching=True)
    engine.submit(1, prompt=9)
    plan = engine.plan()
    engine.submit(2, prompt=9)
    engine.commit(plan)
    used = engine.pool.num_used
    assert starts_at(engine) == {1: 9, 2: 8}
    assert engine.pool.num_used == used + 1
    engine.scheduler.cancel(SequenceKey(1, 1))
    engine.submit(3, prompt=9)
    assert starts_at(engine)[3] == 8


def test_what_is_only_planned_is_not_found() -> None:
    engine = Engine(caching=True, depth=2)
    engine.submit(1, prompt=9)
    first = engine.plan()
    engine.submit(2, prompt=9)
    second = engine.plan()
    assert second.entries[0].start == 0
    engine.commit(first)
    engine.commit(second)
    engine.submit(3, prompt=9)
    assert {e.key.sequence_id: e.start for p in engine.fill() for e in p.entries}[3] == 8


def test_a_dead_sequence_leaves_no_block_that_was_not_committed() -> None:
    engine = Engine(caching=True)
    engine.submit(1, prompt=9)
    plan = engine.plan()
    engine.scheduler.cancel(SequenceKey(1, 1))
    engine.commit(plan)
    assert engine.pool.num_idle == 0


def test_a_salt_keeps_tenants_apart() -> None:
    engine = Engine(caching=True)
    run_once(engine, prompt=9, salt=b"a")
    engine.submit(1, prompt=9, salt=b"b")
    engine.submit(2, prompt=9)
    engine.submit(3, prompt=9, salt=b"a")
    starts: dict[int, int] = {}
    while len(starts) < 3:
        starts = {**starts_at(engine), **starts}
    assert starts == {1: 0, 2: 0, 3: 8}


def test_without_a_cache_nothing_is_found_or_counted() -> None:
    engine = Engine(caching=False)
    run_once(engine, prompt=9)
    engine.submit(1, prompt=9)
    assert starts_at(engine) == {1: 0}
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits, engine.pool.num_idle) == (0, 0, 0)


def test_cached_blocks_make_room_and_shared_ones_need_none() -> None:
    """Of 8 blocks 1 holds 3. 2 needs 6, of which 2 are shared: 4 are free, and one stays for who runs."""
    engine = Engine(num_blocks=8, caching=True)
    engine.submit(1, prompt=9, max_tokens=3)
    engine.step()
    engine.submit(2, prompt=21, max_tokens=2)
    assert engine.step() == {1: (9, 1), 2: (8, 13)}
    assert engine.pool.num_free == 1


def test_a_found_block_is_not_evicted_for_its_finder() -> None:
    engine = Engine(num_blocks=4, caching=True)
    run_once(engine, prompt=12, max_tokens=1)
    assert (engine.pool.num_idle, engine.pool.num_free) == (3, 4)
    engine.submit(1, prompt=14, max_tokens=1)
    assert starts_at(engine) == {1: 12}


def test_an_evicted_head_hides_its_tail_and_an_evicted_tail_does_not_hide_its_head() -> None:
    engine = Engine(num_blocks=4, caching=True)
    run_once(engine, prompt=12, max_tokens=1)
    run_once(engine, prompt=8, max_tokens=1, first=90)  # takes the blank block and the oldest tail
    engine.submit(1, prompt=13, max_tokens=1)
    assert starts_at(engine) == {1: 8}


# ---- what it costs


def test_nothing_is_hashed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    plain = prefix_cache.block_hash

    def counting(parent: bytes, tokens: tuple[int, ...]) -> bytes:
        hashed.append(plain(parent, tokens))
        return hashed[-1]

    monkeypatch.setattr(prefix_cache, "block_hash", counting)
    engine = Engine(num_blocks=6, caching=True)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10, first=90)
    finish(engine)
    assert engine.scheduler.preemptions == 1
    assert len(hashed) == len(set(hashed)) == 8  # 16 of 17 tokens are computed


def test_the_chain_is_that_of_the_domain() -> None:
    engine = Engine(caching=True)
    run_once(engine, prompt=6, max_tokens=4, salt=b"tenant")
    expected = block_hashes([*range(10, 16), TOKEN, TOKEN], 4, b"tenant")
    assert all(engine.pool.find(name) is not None for name in expected)
    assert engine.pool.num_idle == 2


# ---- lengths that matter to rotary embeddings


def test_where_frequencies_switch_a_sequence_is_computed_anew_and_shares_nothing_from_before() -> None:
    engine = Engine(caching=True, rope_by_length=SWITCH)
    engine.submit(1, prompt=9, max_tokens=6)
    plan = engine.plan()
    assert (plan.entries[0].start, plan.entries[0].num_prompt) == (0, 9)
    engine.commit(plan)  # 10 known
    plan = engine.plan()
    assert (plan.entries[0].start, plan.entries[0].num_prompt) == (9, 9)
    engine.commit(plan)  # 11 known
    plan = engine.plan()
    (entry,) = plan.entries
    assert (entry.start, len(entry.token_ids), entry.num_prompt, entry.first_block) == (0, 11, 11, 0)
    assert len(plan.starts[0].generated_token_ids) == 2
    engine.commit(plan)
    assert engine.step() == {1: (11, 1)}
    assert engine.scheduler.preemptions == 0
    # A later, longer sequence finds the new blocks; a short one finds the old ones.
    engine.submit(2, prompt=9, resume=2, max_tokens=6)
    engine.submit(3, prompt=9, max_tokens=1)
    plan = engine.plan()
    assert {e.key.sequence_id: (e.start, e.num_prompt) for e in plan.entries} == {1: (12, 11), 2: (8, 11), 3: (8, 9)}
    tables = {e.key.sequence_id: e.new_block_ids[:2] for e in plan.entries}
    assert not set(tables[2]) & set(tables[3])


def test_a_long_prompt_is_on_the_far_side_of_the_switch_from_the_beginning() -> None:
    engine = Engine(caching=True, rope_by_length=SWITCH)
    engine.submit(1, prompt=11, max_tokens=6)
    assert [engine.step() for _ in range(3)] == [{1: (0, 11)}, {1: (11, 1)}, {1: (12, 1)}]


def test_a_prompt_that_just_fits_switches_with_its_first_token() -> None:
    engine = Engine(rope_by_length=SWITCH)
    engine.submit(1, prompt=10, max_tokens=6)
    assert [engine.step() for _ in range(3)] == [{1: (0, 10)}, {1: (0, 11)}, {1: (11, 1)}]


def test_where_frequencies_follow_the_length_long_prompts_share_with_their_equals_only() -> None:
    engine = Engine(caching=True, rope_by_length=DYNAMIC, max_num_waiting=4)
    run_once(engine, prompt=13, max_tokens=1)
    run_once(engine, prompt=9, max_tokens=1)
    for name, prompt in [(1, 13), (2, 14), (3, 10), (4, 11)]:
        engine.submit(name, prompt=prompt, max_tokens=1)
    found: dict[int, tuple[int, int]] = {}
    while engine.scheduler.has_work:
        plan = engine.plan()
        found = {**{e.key.sequence_id: (e.start, e.num_prompt) for e in plan.entries}, **found}
        engine.commit(plan)
    assert found == {1: (12, 13), 2: (0, 14), 3: (8, 10), 4: (0, 11)}


def test_a_resumed_sequence_keeps_its_prompts_length_where_frequencies_follow_it() -> None:
    engine = Engine(rope_by_length=DYNAMIC)
    engine.submit(1, prompt=6, resume=7, max_tokens=20)
    assert engine.plan().entries[0].num_prompt == 6


# ---- the class alone


def test_lookup_leaves_at_least_one_token() -> None:
    pool = BlockPool(8, 1)
    cache = PrefixCache(pool, None)
    sequence = Sequence(SequenceKey(1, 1), (5, 6, 7), SamplingParams(max_tokens=4))
    blocks = pool.allocate(3)
    for block, name in zip(blocks, block_hashes((5, 6, 7), 1), strict=True):
        pool.put_name(block, name)
    assert cache.lookup(sequence) == blocks[:2]


def test_lookup_ends_at_the_first_block_that_is_missing() -> None:
    pool = BlockPool(8, 1)
    sequence = Sequence(SequenceKey(1, 1), (5, 6, 7, 8), SamplingParams(max_tokens=4))
    blocks = pool.allocate(3)
    names_ = block_hashes((5, 6, 7), 1)
    pool.put_name(blocks[0], names_[0])
    pool.put_name(blocks[2], names_[2])
    assert PrefixCache(pool, None).lookup(sequence) == blocks[:1]
