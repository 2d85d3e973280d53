"""Which table is in force, what changes with it, and how loaded an endpoint is."""

from dataclasses import replace

import pytest

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import LiveLoad, supersedes, table_change


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
