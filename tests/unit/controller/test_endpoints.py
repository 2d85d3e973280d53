from __future__ import annotations

from cluster.controller.endpoints import endpoint_table, first_epoch, next_table
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.endpoint import EndpointTable
from tests.unit.controller.builders import fleet, incarnation, model, ready_fleet


def test_only_ready_and_draining_replicas_are_endpoints():
    made = ready_fleet(3)
    made.advance(incarnation(1), ReplicaEvent.DRAIN, "x", 1.0)
    made.advance(incarnation(2), ReplicaEvent.FAIL, "x", 1.0)
    table = endpoint_table((model(),), made.observed(), 5)
    assert [(e.incarnation.replica.slot, e.draining) for e in table.endpoints] == [(0, False), (1, True)]
    assert table.endpoints[0].address == "10.0.0.1:50060"
    assert table.endpoints[0].block_size == 16
    assert table.models == ("m",)


def test_a_desired_model_without_replicas_is_named():
    assert endpoint_table((model("b"), model("a")), fleet().observed(), 1).models == ("a", "b")


def test_the_epoch_grows_with_every_change_and_only_then():
    made, desired = ready_fleet(), (model(),)
    first = next_table(EndpointTable(7), desired, made.observed())
    assert first.epoch == 8
    assert next_table(first, desired, made.observed()) is first
    made.advance(incarnation(), ReplicaEvent.DRAIN, "x", 1.0)
    assert next_table(first, desired, made.observed()).epoch == 9


def test_a_later_life_starts_above_every_epoch_of_an_earlier_one():
    assert first_epoch(3) > first_epoch(2) + 2**32 - 1
