"""Which table is in force, what changes with it, and how loaded an endpoint is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import QUEUED_PROMPT_TOKENS_MAX, LiveLoad, supersedes, table_change


def endpoint(slot: int, generation: int = 1) -> Endpoint:
    return Endpoint(Incarnation(ReplicaId("demo", slot), generation), f"127.0.0.1:{5000 + slot}", "sha256:a", 16)


@pytest.mark.parametrize(
    ("new", "current", "taken"),
    [
        ((1, "a"), None, True),
        ((5, "a"), (5, "a"), True),
        ((6, "a"), (5, "a"), True),
        ((4, "a"), (5, "a"), False),
        ((4, ""), (5, ""), False),
        ((1, "b"), (900, "a"), True),
        ((1, "b"), (900, ""), True),
        ((1, ""), (900, "a"), True),
    ],
)
def test_epochs_count_within_one_state(new: tuple[int, str], current: tuple[int, str] | None, taken: bool) -> None:
    def table(of: tuple[int, str]) -> EndpointTable:
        return EndpointTable(of[0], state_id=of[1])

    assert supersedes(table(new), table(current) if current else None) is taken


def test_endpoints_that_come_go_and_stay() -> None:
    change = table_change((endpoint(0), endpoint(1)), EndpointTable(2, (endpoint(1), endpoint(2))))
    assert (change.opened, change.closed, change.updated) == ((endpoint(2),), (endpoint(0),), ())


@pytest.mark.parametrize(
    "fields",
    [{"address": "127.0.0.1:1"}, {"checkpoint_digest": "sha256:b"}, {"block_size": 32}],
)
def test_the_same_incarnation_with_another_identity_is_another_endpoint(fields: dict[str, object]) -> None:
    other = replace(endpoint(0), **fields)
    change = table_change((endpoint(0),), EndpointTable(2, (other,)))
    assert (change.opened, change.closed, change.updated) == ((other,), (endpoint(0),), ())


def test_another_generation_is_another_endpoint_and_draining_is_not() -> None:
    reborn, draining = endpoint(0, generation=2), replace(endpoint(1), draining=True)
    change = table_change((endpoint(0), endpoint(1)), EndpointTable(2, (reborn, draining)))
    assert (change.opened, change.closed, change.updated) == ((reborn,), (endpoint(0),), (draining,))


def test_the_larger_of_our_account_and_the_report_counts() -> None:
    load = LiveLoad(block_size=16)
    load.sent(100)
    assert load.tokens == load.outstanding_tokens == 100
    load.reported(LoadSnapshot(kv_blocks_used=10, queued_prompt_tokens=5))
    assert load.tokens == 165
    load.sent(10)
    assert load.tokens == 175
    load.reported(LoadSnapshot())
    assert load.tokens == 110
    load.ended(100)
    load.ended(10)
    assert load.tokens == load.outstanding_tokens == 0
    with pytest.raises(AssertionError, match="twice"):
        load.ended(1)


class TestRoom:
    """Whether one more sequence would begin soon."""

    def load(self, slots: int = 8, **reported: int) -> LiveLoad:
        load = LiveLoad(16)
        load.max_num_seqs = slots
        load.reported(LoadSnapshot(**reported))
        return load

    def test_slots_and_a_small_backlog(self) -> None:
        load = self.load(slots=16)
        for sent in range(18):
            assert load.has_room, sent
            load.sent(10)
        assert not load.has_room
        load.ended(10)
        assert load.has_room

    def test_sequences_of_other_routers_count(self) -> None:
        assert self.load(running_sequences=6, waiting_sequences=2).has_room
        load = self.load(running_sequences=5, waiting_sequences=2)
        load.sent(10)
        load.sent(10)
        assert not load.has_room

    def test_without_a_card_there_is_no_bound_of_slots(self) -> None:
        assert self.load(slots=0, running_sequences=10_000).has_room

    def test_a_place_that_is_held_is_taken(self) -> None:
        load = self.load(slots=1)
        load.hold(10)
        assert load.has_room
        load.hold(10)
        assert not load.has_room
        load.let_go(10)
        assert load.has_room
        load.let_go(10)
        with pytest.raises(AssertionError, match="twice"):
            load.let_go(10)

    def test_prompts_that_wait_fill_it_too(self) -> None:
        assert self.load(running_sequences=1, queued_prompt_tokens=QUEUED_PROMPT_TOKENS_MAX - 1).has_room
        assert not self.load(running_sequences=1, queued_prompt_tokens=QUEUED_PROMPT_TOKENS_MAX).has_room
        load = self.load(running_sequences=1)
        load.sent(QUEUED_PROMPT_TOKENS_MAX)
        assert not load.has_room
        load.ended(QUEUED_PROMPT_TOKENS_MAX)
        assert load.has_room

    def test_kv_blocks(self) -> None:
        assert self.load(running_sequences=2, kv_blocks_used=99, kv_blocks_total=100).has_room
        assert not self.load(running_sequences=2, kv_blocks_used=100, kv_blocks_total=100).has_room
        load = self.load(running_sequences=2, kv_blocks_used=90, kv_blocks_total=100)
        load.sent(160)
        assert not load.has_room

    def test_an_empty_endpoint_has_room_for_any(self) -> None:
        load = self.load(kv_blocks_used=100, kv_blocks_total=100)
        assert load.has_room

    def test_who_refused_has_none_before_it_reports(self) -> None:
        load = self.load()
        load.refused()
        assert (load.has_room, load.refuses) == (False, True)
        load.reported(LoadSnapshot())
        assert (load.has_room, load.refuses) == (True, False)

    def test_what_ended_before_a_report_does_not_count_for_ever(self) -> None:
        load = self.load(slots=2)
        for _ in range(100):
            load.sent(1000)
            load.ended(1000)
        assert load.has_room

    @given(steps=st.lists(st.sampled_from(["sent", "ended", "hold", "let_go", "refused", "reported", "slots"])))
    def test_who_asks_all_the_time_hears_what_who_asks_late_hears(self, steps: list[str]) -> None:
        often, late = self.load(slots=2), self.load(slots=2)
        sent = held = 0
        for number, step in enumerate(steps):
            if (step == "ended" and not sent) or (step == "let_go" and not held):
                continue
            sent += {"sent": 1, "ended": -1}.get(step, 0)
            held += {"hold": 1, "let_go": -1}.get(step, 0)
            for load in (often, late):
                if step == "reported":
                    load.reported(LoadSnapshot(running_sequences=number % 4))
                elif step == "refused":
                    load.refused()
                elif step == "slots":
                    load.max_num_seqs = 1 + number % 3
                else:
                    getattr(load, step)(10)
            assert often.has_room in (True, False)
        assert often.has_room is late.has_room
