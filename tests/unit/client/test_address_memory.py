"""Which of several addresses is asked first."""

import pytest

from cluster.client.address_memory import AddressMemory

ALL = ["a", "b", "c"]


def test_addresses_are_preferred_in_their_order() -> None:
    memory = AddressMemory(5.0)
    assert [memory.pick(ALL, 0.0), memory.pick(ALL[::-1], 0.0)] == ["a", "c"]


def test_one_request_in_a_while_tries_an_address_that_was_away() -> None:
    memory = AddressMemory(5.0)
    memory.failed("a", "UNAVAILABLE", "", 0.0)
    assert [memory.pick(ALL, now_s) for now_s in (0.0, 4.9, 5.0, 5.0, 9.9, 10.0, 10.1)] == [*"bbabbab"]
    memory.answered("a")
    assert memory.pick(ALL, 10.2) == "a"


def test_an_address_that_was_away_long_ago_has_its_old_place() -> None:
    memory = AddressMemory(5.0)
    memory.failed("c", "UNAVAILABLE", "", 0.0)
    assert memory.pick(ALL, 6.0) == "a"


def test_when_all_are_away_they_take_turns_from_the_longest_ago_on() -> None:
    memory = AddressMemory(5.0)
    for now_s, address in enumerate("cab"):
        memory.failed(address, "UNAVAILABLE", "", now_s)
    assert [memory.pick(ALL, 3.0 + n / 10) for n in range(5)] == [*"cabca"]
    memory.answered("b")
    assert [memory.pick(ALL, 4.0) for _ in range(3)] == [*"bbb"]


@pytest.mark.parametrize(
    ("code", "reason", "away"),
    [
        ("UNAVAILABLE", "", True),
        ("UNAVAILABLE", "DRAINING", True),
        ("UNAVAILABLE", "NO_ENDPOINT", False),
        ("UNAVAILABLE", "REPLICA_FAILED", False),
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", False),
        ("DEADLINE_EXCEEDED", "", False),
    ],
)
def test_a_router_that_refuses_is_there(code: str, reason: str, *, away: bool) -> None:
    memory = AddressMemory(5.0)
    memory.failed("a", code, reason, 0.0)
    assert memory.pick(ALL, 1.0) == ("b" if away else "a")


@pytest.mark.parametrize(("reason", "then"), [("QUEUE_FULL", "a"), ("", "b")])
def test_a_refusal_proves_that_an_address_is_back(reason: str, then: str) -> None:
    memory = AddressMemory(5.0)
    memory.failed("a", "UNAVAILABLE", "", 0.0)
    memory.failed("a", "RESOURCE_EXHAUSTED", reason, 1.0)
    assert memory.pick(ALL, 2.0) == then


def test_addresses_of_long_ago_are_forgotten() -> None:
    memory = AddressMemory(5.0)
    for pod in range(1000):
        memory.failed(f"pod-{pod}", "UNAVAILABLE", "", float(pod))
    assert len(memory._away_until_s) < 100
