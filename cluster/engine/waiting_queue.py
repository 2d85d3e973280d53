"""The sequences that wait for their turn in an engine, in rank order, and how many of them may."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter

from cluster.engine.limits import SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step_room import StepRoom

RANK = attrgetter("rank")
_LOOK_PAST = 64  # so far back a short prompt is looked for in each step


class WaitingQueue:
    """Sequences by rank. The bounds hold for those that have not started; a started one always finds room.

    ``num_tokens``: known tokens of all that wait.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._sequences: list[Sequence] = []
        self._num_unstarted = 0
        self._unstarted_tokens = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        return self._sequences[0]

    def next_for(self, room: StepRoom) -> Sequence | None:
        """Who is to start next: the first, or while long prompts have their share of the step, a short one soon behind.

        The first keeps its turn: it waits for that share alone, and not for what short ones could take from it.
        """
        if not room.tokens:
            return None
        return next((s for s in islice(self._sequences, _LOOK_PAST) if room.of(s.num_tokens)), None)

    def overflow(self, sequence: Sequence) -> str:
        """Why there is no room for one more, in a sentence that names the fix; empty when there is."""
        return "" if sequence.started else self._limits.overflow(sequence, self._num_unstarted, self._unstarted_tokens)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=RANK)
        self._book(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """Before anything of ``sequence`` changes, ``started`` too."""
        self._sequences.remove(sequence)
        self._book(sequence, -1)

    def check(self) -> None:
        """Every invariant, for tests and post-mortems."""
        assert self._sequences == sorted(self._sequences, key=RANK), "the waiting queue is out of order"
        assert self.num_tokens == sum(s.num_tokens for s in self._sequences), "waiting tokens are miscounted"
        unstarted = [s.num_tokens for s in self._sequences if not s.started]
        assert (len(unstarted), sum(unstarted)) == (self._num_unstarted, self._unstarted_tokens), "miscounted"
        assert len(unstarted) <= self._limits.max_num_waiting, "too many wait"
        assert len(unstarted) < 2 or sum(unstarted) <= self._limits.max_waiting_prompt_tokens, "too many tokens wait"

    def _book(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.num_tokens
        if not sequence.started:
            self._num_unstarted += sign
            self._unstarted_tokens += sign * sequence.num_tokens
