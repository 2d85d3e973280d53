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
        assert turns.add(prompt[0], prompt) is None
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
    assert turns.add("c", "c1") is None
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
    assert turns.add(newcomer[0], newcomer) == refused
    assert set(order(turns)) == {*prompts, newcomer} - {refused}


class Turns(RuleBasedStateMachine):
    """Against what each tenant may expect, whatever the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: PromptTurns[tuple[str, int]] = PromptTurns(WAITING_MAX)
        self.numbers = itertools.count()
        self.lines: dict[str, list[tuple[str, int]]] = {}
        self.passed_by: dict[str, Counter[str]] = {}  # turns of others since it began to wait, or had its own

    def _leave(self, prompt: tuple[str, int]) -> None:
        tenant = prompt[0]
        self.lines[tenant].remove(prompt)
        if not self.lines[tenant]:
            del self.lines[tenant], self.passed_by[tenant]

    @rule(tenant=st.sampled_from("abcd"))
    def comes(self, tenant: str) -> None:
        before = Counter({name: len(line) for name, line in self.lines.items()})
        prompt = (tenant, next(self.numbers))
        refused = self.turns.add(tenant, prompt)
        self.lines.setdefault(tenant, []).append(prompt)
        self.passed_by.setdefault(tenant, Counter())
        if before.total() < WAITING_MAX:
            assert refused is None
            return
        assert refused is not None
        assert refused == self.lines[refused[0]][-1], "the youngest goes"
        if refused == prompt:
            assert before[tenant] + 2 > max(before.values()), "somebody had much more"
        else:
            assert before[refused[0]] == max(before.values()) >= before[tenant] + 2
        self._leave(refused)

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
