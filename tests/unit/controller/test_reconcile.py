from __future__ import annotations

import re

from cluster.config.schema import ControllerConfig
from cluster.controller.actions import Advance, Fence, Remove, Start
from cluster.controller.fleet import Fleet, SlotRecord
from cluster.controller.observed import Observed, RankActivity, SlotHistory
from cluster.controller.reconcile import after_failure, backoff_s, reconcile
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import RankId
from cluster.domain.replica import RankPhase
from tests.unit.controller.builders import SETTINGS, fleet, incarnation, model, ready_fleet, report


def act(desired, made, now_s):
    return reconcile(desired, made.observed(), SETTINGS, now_s)


def test_nothing_wanted_nothing_done():
    assert reconcile((), Observed(), SETTINGS, 0.0) == ()


def test_what_is_missing_is_started_in_the_lowest_slots():
    actions = reconcile((model(replicas=2),), Observed(), SETTINGS, 0.0)
    assert [a.incarnation for a in actions] == [incarnation(0), incarnation(1)]
    assert all(isinstance(a, Start) for a in actions)


def test_nothing_is_started_while_earlier_ranks_may_still_report():
    assert reconcile((model(),), Observed(adopt_until_s=3.0), SETTINGS, 2.9) == ()
    assert reconcile((model(),), Observed(adopt_until_s=3.0), SETTINGS, 3.0)


def test_a_ready_replica_needs_nothing():
    assert act((model(),), ready_fleet(), 1.0) == ()


def test_loading_then_ready():
    made, who = fleet(), incarnation()
    made.start(who, model().fingerprint, 2, "wanted", 0.0)
    made.advance(who, ReplicaEvent.PLACED, "placed", 0.0)
    assert act((model(),), made, 0.1) == ()
    made.report(report(who, 0, RankPhase.LOADING), 0, 0.2)
    (action,) = act((model(),), made, 0.2)
    assert action.event is ReplicaEvent.LOADING
    made.advance(who, action.event, action.reason, 0.2)
    for rank in range(2):
        made.report(report(who, rank), rank, 0.3)
    (action,) = act((model(),), made, 0.3)
    assert action.event is ReplicaEvent.READY


def test_a_dead_rank_fails_the_replica_then_everything_is_removed_then_rebuilt():
    made, who = ready_fleet(), incarnation()
    made.stream_broken(RankId(who, 1), (0, 1))
    (fail,) = act((model(),), made, 1.0)
    assert fail.event is ReplicaEvent.FAIL
    made.advance(who, fail.event, fail.reason, 1.0)
    assert act((model(),), made, 1.0) == (Remove(who),)
    made.removing(who)
    assert act((model(),), made, 1.1) == ()
    made.removed(who, 1.2, gone=True)
    assert act((model(),), made, 1.4) == ()  # half a second of backoff
    (start,) = act((model(),), made, 1.5)
    assert start.incarnation == incarnation(generation=2)


def test_remains_that_do_not_go_are_tried_again_and_block_the_slot():
    made, who = ready_fleet(), incarnation()
    made.advance(who, ReplicaEvent.FAIL, "x", 1.0)
    made.removing(who)
    made.removed(who, 2.0, gone=False)
    assert act((model(),), made, 3.0) == ()
    assert act((model(),), made, 7.0) == (Remove(who),)


def test_scaling_down_drains_the_youngest():
    (action,) = act((model(replicas=2),), ready_fleet(3), 10.0 - 6)
    assert action == Advance(incarnation(2), ReplicaEvent.DRAIN, "scaled to 2", 30.0)


def test_scaling_down_takes_those_not_ready_first():
    made = ready_fleet(2)
    late = incarnation(0, 1, "m")
    made.advance(late, ReplicaEvent.FAIL, "x", 2.0)
    made.removing(late)
    made.removed(late, 2.0, gone=True)
    made.start(incarnation(0, 2), model().fingerprint, 2, "again", 3.0)
    (action,) = act((model(replicas=1),), made, 3.1)
    assert (action.incarnation, action.event) == (incarnation(0, 2), ReplicaEvent.STOP)


def test_a_model_that_is_no_longer_wanted_is_drained():
    (action,) = act((), ready_fleet(), 1.0)
    assert action.event is ReplicaEvent.DRAIN


def test_a_drained_replica_stops_when_routers_have_seen_it_and_nothing_runs():
    made, who = ready_fleet(), incarnation()
    made.advance(who, ReplicaEvent.DRAIN, "x", 1.0, 30.0)
    made.report(report(who, 0), (0, 0), 1.5)
    assert act((model(),), made, 1.6) == ()
    made.report(report(who, 0, activity=RankActivity(running_sequences=1)), (0, 0), 2.5)
    assert act((model(),), made, 2.5) == ()
    made.report(report(who, 0), (0, 0), 3.0)
    assert act((model(),), made, 3.0)[0].event is ReplicaEvent.STOP


def test_a_drain_ends_at_its_deadline():
    made, who = ready_fleet(), incarnation()
    made.advance(who, ReplicaEvent.DRAIN, "x", 1.0, 2.0)
    for rank in range(2):
        made.report(report(who, rank, activity=RankActivity(running_sequences=1)), (0, rank), 2.9)
    assert act((model(),), made, 2.9) == ()
    (stop,) = act((model(),), made, 3.0)
    assert stop.reason == "drain deadline reached"


def test_a_drained_replica_is_replaced_in_its_slot():
    made, who = ready_fleet(), incarnation()
    made.advance(who, ReplicaEvent.DRAIN, "x", 1.0)
    made.advance(who, ReplicaEvent.STOP, "x", 2.0)
    made.removing(who)
    made.removed(who, 2.0, gone=True)
    (start,) = act((model(),), made, 2.0)
    assert start.incarnation == incarnation(generation=2)


def test_changed_settings_roll_one_replica_at_a_time():
    made, changed = ready_fleet(2), model(replicas=2, max_model_len=64)
    actions = act((changed,), made, 2.0)
    assert [(a.incarnation, a.event) for a in actions] == [(incarnation(0), ReplicaEvent.DRAIN)]
    made.advance(incarnation(0), ReplicaEvent.DRAIN, "x", 2.0, 30.0)
    assert act((changed,), made, 2.1) == ()


def test_the_number_of_replicas_is_no_changed_setting():
    assert model(replicas=1).fingerprint == model(replicas=5).fingerprint
    assert model().fingerprint != model(max_model_len=64).fingerprint


def test_ranks_of_an_older_generation_are_fenced_and_block_nothing_else():
    made = ready_fleet()
    made.report(report(incarnation(1, 7), 3), "s", 1.0)
    actions = act((model(replicas=1),), made, 1.0)
    assert actions == (Fence(incarnation(1, 7), 4),)
    assert act((model(replicas=2),), made, 1.0) == actions  # slot 1 waits until they are gone
    made.removed(incarnation(1, 7), 1.5, gone=True)
    assert [type(a) for a in act((model(replicas=2),), made, 1.5)] == [Start]


def test_backoff_doubles_up_to_its_bound():
    assert [backoff_s(n, SETTINGS) for n in range(5)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert backoff_s(10_000, SETTINGS) == 60.0
    assert backoff_s(3, ControllerConfig(restart_backoff_s=0)) == 0.0


def test_backoff_starts_over_once_a_replica_was_stable():
    many = SlotHistory(9, failures=6)
    assert after_failure(many, None, SETTINGS, 100.0, fingerprint="").failures == 7
    assert after_failure(many, 0.1, SETTINGS, 100.0, fingerprint="").failures == 7
    assert after_failure(many, 60.0, SETTINGS, 100.0, fingerprint="") == SlotHistory(9, 1, 100.5)
    assert after_failure(many, None, SETTINGS, 100.0, fingerprint="other") == SlotHistory(9, 1, 100.5, "other")


def test_what_would_fail_again_waits_longest():
    once = after_failure(SlotHistory(1), None, SETTINGS, 100.0, fingerprint="f", needs_change=True)
    assert once == SlotHistory(1, 1, 100.0 + SETTINGS.restart_backoff_max_s, "f")
    made = damaged_fleet()
    assert act((model(),), made, SETTINGS.restart_backoff_max_s + 0.9) == ()
    assert [type(a) for a in act((model(),), made, SETTINGS.restart_backoff_max_s + 1.1)] == [Start]


def test_mended_options_wait_for_nothing():
    made, mended = damaged_fleet(), model(max_model_len=64)
    assert act((model(),), made, 1.6) == ()
    assert [type(a) for a in act((mended,), made, 1.6)] == [Start]
    # These fail too: the first pause is theirs.
    made.start(incarnation(generation=2), mended.fingerprint, 2, "wanted", 1.6)
    made.advance(incarnation(generation=2), ReplicaEvent.FAIL, "lost", 2.0)
    made.removed(incarnation(generation=2), 2.0, gone=True)
    assert made.observed().slots[incarnation().replica].failures == 1
    assert act((mended,), made, 2.0 + SETTINGS.restart_backoff_s - 0.1) == ()
    assert [type(a) for a in act((mended,), made, 2.0 + SETTINGS.restart_backoff_s)] == [Start]


def test_mended_files_are_tried_once_the_same_is_asked_for_again():
    made = damaged_fleet()
    made.end_pauses({"other"})
    assert act((model(),), made, 1.6) == ()
    made.end_pauses({model().name})
    (start,) = act((model(),), made, 1.6)
    assert start.incarnation == incarnation(generation=2)
    assert re.fullmatch(r"rebuilt after 1 failure\(s\), the last: .*a\.safetensors is damaged.*", start.reason)


def damaged_fleet():
    """One replica that failed at 1.0 over a damaged file; nothing is left of it."""
    made = fleet()
    made.start(incarnation(), model().fingerprint, 2, "wanted", 0.0)
    made.advance(incarnation(), ReplicaEvent.PLACED, "placed", 0.0)
    damaged = {"failure": "CheckpointError: a.safetensors is damaged", "needs_change": True}
    made.report(report(incarnation(), 1, RankPhase.FAILED, **damaged), (0, 1), 0.5)
    (failed,) = act((model(),), made, 1.0)
    assert "a.safetensors is damaged" in failed.reason
    made.advance(incarnation(), failed.event, failed.reason, 1.0)
    made.removed(incarnation(), 1.5, gone=True)
    return made


def test_a_draining_node_drains_what_is_ready_on_it_within_what_is_left():
    made = ready_fleet(2)
    made.report(report(incarnation(1), 0, node_id="n1"), "s", 2.0)
    made.report(report(incarnation(1), 1, node_id="n1"), "s", 2.0)
    made.drain_nodes({"n0"}, "10.0.0.1", 12.0)
    assert act((model(replicas=2),), made, 2.0) == (
        Advance(incarnation(0), ReplicaEvent.DRAIN, "node 10.0.0.1 is draining", 10.0),
    )


def test_one_rank_on_a_draining_node_is_enough():
    made = ready_fleet()
    made.report(report(incarnation(), 1, node_id="n7"), "s", 1.0)
    made.drain_nodes({"n7"}, "10.0.0.7", 5.0)
    (action,) = act((model(),), made, 1.0)
    assert (action.incarnation, action.event) == (incarnation(), ReplicaEvent.DRAIN)


def test_what_is_not_ready_on_a_draining_node_is_stopped_placed_or_not_yet_heard_of():
    made, who = fleet(), incarnation()
    made.start(who, model().fingerprint, 2, "wanted", 0.0)
    made.drain_nodes({"n0"}, "10.0.0.1", 60.0)
    assert act((model(),), made, 1.0) == ()  # it still looks for room
    made.note_placed(who, frozenset({"n0"}))
    assert act((model(),), made, 1.0) == (Advance(who, ReplicaEvent.STOP, "node 10.0.0.1 is draining"),)
    made.note_placed(who, frozenset())
    assert act((model(),), made, 1.0) == ()


def test_streams_of_a_slow_drain_end_with_their_node():
    made, who = ready_fleet(), incarnation()
    made.advance(who, ReplicaEvent.DRAIN, "scaled", 1.0, 1000.0)
    made.drain_nodes({"n0"}, "10.0.0.1", 4.0)
    for rank in range(2):
        made.report(report(who, rank, activity=RankActivity(running_sequences=1)), (0, rank), 4.0)
    assert act((model(replicas=0),), made, 3.9) == ()
    assert act((model(replicas=0),), made, 4.0) == (Advance(who, ReplicaEvent.STOP, "node 10.0.0.1 is draining"),)


def test_what_leaves_with_its_node_is_replaced_before_it_is_gone():
    made = ready_fleet(2)
    made.drain_nodes({"n0"}, "10.0.0.1", 100.0)
    for slot in range(2):
        made.advance(incarnation(slot), ReplicaEvent.DRAIN, "node", 2.0, 98.0)
    actions = act((model(replicas=2),), made, 2.1)
    assert [a.incarnation for a in actions if isinstance(a, Start)] == [incarnation(2), incarnation(3)]
    assert [a for a in act((model(replicas=1),), made, 2.1) if isinstance(a, Start)] == [
        Start(incarnation(2), "wanted")
    ]


def test_a_drain_for_another_reason_is_not_replaced_before_it_is_gone():
    made = ready_fleet()
    made.advance(incarnation(), ReplicaEvent.DRAIN, "an operator asked for it", 1.0, 30.0)
    assert act((model(),), made, 1.1) == ()


def test_the_earlier_deadline_of_a_node_counts_and_a_node_that_left_counts_no_more():
    made = ready_fleet()
    made.drain_nodes({"n0"}, "10.0.0.1", 50.0)
    made.drain_nodes({"n0"}, "10.0.0.1", 90.0)
    (action,) = act((model(),), made, 2.0)
    assert action.drain_s == 48.0
    made.keep_nodes({"n1"})
    assert act((model(),), made, 1.0) == ()


def adopted_half() -> Fleet:
    """A replica of an earlier controller of which one rank of two has reported, READY."""
    who = incarnation()
    made = fleet(adopt_for_s=3.0, slots={who.replica: SlotRecord(1, model().fingerprint, 2)})
    made.report(report(who, 0), "s0", 1.0)
    made.advance(who, ReplicaEvent.LOADING, "loading", 1.0)
    return made


def test_what_may_be_serving_is_not_stopped_before_all_its_ranks_have_reported():
    made, who = adopted_half(), incarnation()
    made.drain_nodes({"n0"}, "10.0.0.1", 60.0)
    assert act((model(),), made, 1.1) == ()
    assert act((), made, 1.1) == ()
    assert made.observed().on_nodes({"n9"}), "its other rank may be anywhere"
    made.report(report(who, 1, node_id="n1"), "s1", 1.2)
    assert [a.event for a in act((model(),), made, 1.2)] == [ReplicaEvent.READY]
    made.advance(who, ReplicaEvent.READY, "ready", 1.2)
    assert act((model(),), made, 1.2) == (Advance(who, ReplicaEvent.DRAIN, "node 10.0.0.1 is draining", 60.0 - 1.2),)
    assert not made.observed().on_nodes({"n9"})


def test_a_node_whose_deadline_is_over_waits_for_no_report():
    made = adopted_half()
    made.drain_nodes({"n0"}, "10.0.0.1", 1.0)
    assert [a.event for a in act((model(),), made, 1.1)] == [ReplicaEvent.STOP]


def test_an_end_hurries_what_drains_and_what_will():
    made = ready_fleet(2)
    made.advance(incarnation(0), ReplicaEvent.DRAIN, "node", 1.0, 3600.0)
    made.end_by(5.0)
    made.end_by(9.0)
    made.advance(incarnation(1), ReplicaEvent.DRAIN, "scaled to 0", 2.0, 3600.0)
    assert [view.drain_until_s for view in made.observed().replicas] == [5.0, 5.0]
