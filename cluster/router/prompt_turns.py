"""Whose prompt is tokenized next, and which ones are refused when too much waits. Pure.

Tenants with something waiting stand in a ring; each turn takes the oldest prompt of the first of them, who then stands
last. So the oldest prompt of a tenant waits for at most one of each other tenant. Prompts have sizes. When more than
``waiting_max`` would wait, the youngest prompts of the tenant with the most make room for a newcomer, as long as that
tenant has more than the newcomer's would have; else the newcomer is refused. So nobody gets room by sending more, and
who was refused cannot have the room back by trying again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Prompt = TypeVar("Prompt")


class PromptTurns(Generic[Prompt]):
    """Prompts, each once and hashable, that wait for a thread; a tenant with nothing waiting leaves no trace."""

    def __init__(self, waiting_max: int) -> None:
        assert waiting_max > 0, "somebody must be able to wait"
        self._waiting_max = waiting_max
        self._lines: OrderedDict[str, OrderedDict[Prompt, int]] = OrderedDict()  # sizes by tenant, who is next first
        self._sizes: dict[str, int] = {}  # of the lines
        self._tenants: dict[Prompt, str] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, tenant: str, prompt: Prompt, size: int = 1) -> list[Prompt]:
        """Who does not wait (any more) because of this: nobody, other prompts, or ``prompt`` alone.

        O(1) while there is room, else O(tenants that wait) for each one that leaves.
        """
        assert prompt not in self._tenants, "a prompt waits twice"
        assert 0 < size <= self._waiting_max, "such a prompt could never wait"
        fits = self._waiting + size <= self._waiting_max
        leaving = [] if fits else self._makes_room(tenant, size)
        if leaving is None:
            return [prompt]
        for one in leaving:
            self.discard(one)
        self._lines.setdefault(tenant, OrderedDict())[prompt] = size
        self._sizes[tenant] = self._sizes.get(tenant, 0) + size
        self._tenants[prompt] = tenant
        self._waiting += size
        return leaving

    def next(self, largest: int | None = None) -> Prompt | None:
        """Takes whose turn it is; None when nobody waits.

        With ``largest``, tenants whose oldest prompt is larger keep their places in the ring and wait on.
        """
        for tenant, line in self._lines.items():
            prompt, size = next(iter(line.items()))
            if largest is None or size <= largest:
                self._lines.move_to_end(tenant)
                self.discard(prompt)
                return prompt
        return None

    def discard(self, prompt: Prompt) -> None:
        """It waits no more, if it did."""
        tenant = self._tenants.pop(prompt, None)
        if tenant is None:
            return
        line = self._lines[tenant]
        size = line.pop(prompt)
        self._waiting -= size
        self._sizes[tenant] -= size
        if not line:
            del self._lines[tenant], self._sizes[tenant]

    def _makes_room(self, tenant: str, size: int) -> list[Prompt] | None:
        """The youngest of whoever has most, of several of the one whose turn comes last; None: not enough of them."""
        sizes = {name: self._sizes[name] for name in reversed(self._lines)}
        youngest = {name: reversed(line.items()) for name, line in self._lines.items()}
        would_have = sizes.get(tenant, 0) + size
        missing = self._waiting + size - self._waiting_max
        leaving = []
        while missing > 0:
            longest = max(sizes, key=sizes.__getitem__)
            if sizes[longest] <= would_have:
                return None
            left, its_size = next(youngest[longest])
            leaving.append(left)
            sizes[longest] -= its_size
            missing -= its_size
        return leaving

    def check(self) -> None:
        """Every invariant, for tests."""
        assert self._waiting == sum(self._sizes.values()) <= self._waiting_max, "more wait than may"
        assert all(self._lines.values()), "a tenant without anything waiting is kept"
        assert self._sizes == {tenant: sum(line.values()) for tenant, line in self._lines.items()}
        found = {prompt: tenant for tenant, line in self._lines.items() for prompt in line}
        assert found == self._tenants, "a prompt is in the wrong line"
