"""Tenants take turns, and who sends most is refused first."""

import itertools
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.router.prompt_turns import PromptTurns

WAITING_MAX = 6


def waiting(*prompts: str, waiting_max: int = 100) -> PromptTurns[str]:
    """Prompts named by tenant and number, as "a1"."""
    turns: PromptTurns[str] = PromptTurns(waiting_max)
    for prompt in prompts:
        assert turns.add(prompt[0], prompt) == []
    return turns


def order(turns: PromptTurns[str]) -> list[str]:
    return list(iter(turns.next, None))


def test_tenants_take_turns_and_each_ones_prompts_come_as_they_came() -> None:
    turns = waiting("a1", "a2", "a3", "b1", "c1", "b2")
    assert order(turns) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(turns), turns.next()) == (0, None)


def test_a_newcomer_waits_for_one_of_each_other_tenant() -> None:
    turns = waiting(*(f"a{n}" for n in range(50)), *(f"b{n}" for n in range(40)))
    assert [turns.next() for _ in range(4)] == ["a0", "b0", "a1", "b1"]
    assert turns.add("c", "c1") == []
    assert order(turns)[:3] == ["a2", "b2", "c1"]


def test_who_was_just_served_stands_behind_who_waits() -> None:
    turns = waiting("a1", "b1", "b2")
    assert turns.next() == "a1"
    turns.add("a", "a2")
    assert order(turns) == ["b1", "a2", "b2"]


def test_who_leaves_is_passed_by_and_leaves_no_trace() -> None:
    turns = waiting("a1", "a2", "b1", "c1")
    for left in ("a1", "b1", "b1", "never came"):
        turns.discard(left)
    turns.check()
    assert len(turns) == 2
    turns.add("b", "b2")  # as if for the first time
    assert order(turns) == ["a2", "c1", "b2"]


@pytest.mark.parametrize(
    ("prompts", "newcomer", "refused"),
    [
        (["a1", "a2", "a3", "a4"], "a5", "a5"),
        (["a1", "a2", "a3", "a4"], "b1", "a4"),
        (["a1", "a2", "a3", "b1"], "b2", "a3"),
        (["a1", "a2", "a3", "b1"], "a4", "a4"),
        (["a1", "a2", "b1", "b2"], "b3", "b3"),
        (["a1", "a2", "b1", "b2"], "c1", "b2"),
        (["a1", "b1", "c1", "d1"], "e1", "e1"),
        (["a1", "b1", "c1", "d1"], "a2", "a2"),
    ],
)
def test_when_it_is_full_the_tenant_with_the_most_makes_room(prompts: list[str], newcomer: str, refused: str) -> None:
    turns = waiting(*prompts, waiting_max=4)
    assert turns.add(newcomer[0], newcomer) == [refused]
    assert set(order(turns)) == {*prompts, newcomer} - {refused}


@pytest.mark.parametrize(
    ("newcomer", "size", "refused"),
    [
        ("c1", 10, []),
        ("c1", 15, ["a4"]),
        ("c1", 22, ["a4", "a3"]),
        ("c1", 30, ["c1"]),
        ("b2", 19, ["a4"]),
        ("b2", 30, ["b2"]),
        ("a5", 11, ["a5"]),
    ],
)
def test_as_many_make_room_as_it_takes_or_nobody(newcomer: str, size: int, refused: list[str]) -> None:
    turns: PromptTurns[str] = PromptTurns(60)
    for prompt in ("a1", "b1", "a2", "a3", "a4"):
        assert turns.add(prompt[0], prompt, 10) == []
    assert turns.add(newcomer[0], newcomer, size) == refused
    turns.check()
    assert set(order(turns)) == {"a1", "a2", "a3", "a4", "b1", newcomer} - set(refused)


def test_while_only_small_ones_may_run_the_others_keep_their_places() -> None:
    turns: PromptTurns[str] = PromptTurns(100)
    for prompt, size in (("a1", 30), ("a2", 1), ("b1", 1), ("c1", 20), ("b2", 1)):
        turns.add(prompt[0], prompt, size)
    assert [turns.next(largest=5) for _ in range(3)] == ["b1", "b2", None]
    assert order(turns) == ["a1", "c1", "a2"]


class Turns(RuleBasedStateMachine):
    """Against what each tenant may expect, whatever the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: PromptTurns[tuple[str, int]] = PromptTurns(WAITING_MAX)
        self.numbers = itertools.count()
        self.lines: dict[str, list[tuple[str, int]]] = {}
        self.sizes: dict[tuple[str, int], int] = {}
        self.passed_by: dict[str, Counter[str]] = {}  # turns of others since it began to wait, or had its own

    def _leave(self, prompt: tuple[str, int]) -> None:
        tenant = prompt[0]
        self.lines[tenant].remove(prompt)
        if not self.lines[tenant]:
            del self.lines[tenant], self.passed_by[tenant]

    def size_of(self, tenant: str) -> int:
        return sum(self.sizes[prompt] for prompt in self.lines.get(tenant, ()))

    @rule(tenant=st.sampled_from("abcd"), size=st.integers(1, 3))
    def comes(self, tenant: str, size: int) -> None:
        waiting = sum(map(self.size_of, self.lines))
        would_have = self.size_of(tenant) + size
        prompt = (tenant, next(self.numbers))
        self.sizes[prompt] = size
        refused = self.turns.add(tenant, prompt, size)
        if refused == [prompt]:
            assert waiting + size > WAITING_MAX
            assert all(
                self.size_of(name) <= would_have or waiting - self.taken_away(name, would_have) + size > WAITING_MAX
                for name in self.lines
            ), "one tenant alone could have made room"
            return
        assert (waiting + size > WAITING_MAX) == bool(refused), "nobody goes without need"
        for one in refused:
            assert self.size_of(one[0]) > would_have, "who has more than the newcomer's tenant will"
            assert one == self.lines[one[0]][-1], "the youngest goes"
            self._leave(one)
        self.lines.setdefault(tenant, []).append(prompt)
        self.passed_by.setdefault(tenant, Counter())

    def taken_away(self, tenant: str, down_to: int) -> int:
        """What goes when the youngest go while ``tenant`` has more than ``down_to``."""
        left = before = self.size_of(tenant)
        for prompt in reversed(self.lines[tenant]):
            if left <= down_to:
                break
            left -= self.sizes[prompt]
        return before - left

    @rule()
    def a_thread_is_free(self) -> None:
        prompt = self.turns.next()
        assert (prompt is None) == (not self.lines)
        if prompt is None:
            return
        tenant = prompt[0]
        assert prompt == self.lines[tenant][0], "the oldest of its tenant is next"
        self._leave(prompt)
        for other, passed in self.passed_by.items():
            passed[tenant] += other != tenant
            assert max(passed.values()) <= 1, "one of each other tenant comes before it, no more"
        if tenant in self.passed_by:
            self.passed_by[tenant].clear()

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from([one for line in self.lines.values() for one in line]))
        self.turns.discard(prompt)
        self._leave(prompt)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.turns.check()
        assert len(self.turns) == sum(map(len, self.lines.values()))


TestTurns = Turns.TestCase
