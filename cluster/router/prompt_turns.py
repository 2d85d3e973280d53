"""Whose prompt is tokenized next, and which one is refused when too many wait. Pure.

Tenants with something waiting stand in a ring; each turn takes the oldest prompt of the first of them, who then stands
last. So the oldest prompt of a tenant waits for at most one of each other tenant. When ``waiting_max`` wait, the
youngest of the tenant with the most makes room for a newcomer, if that tenant keeps at least as many as the newcomer's
would have; else the newcomer is refused. So nobody gets room by sending more.
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
        self._lines: OrderedDict[str, OrderedDict[Prompt, None]] = OrderedDict()  # by tenant, who is next first
        self._tenants: dict[Prompt, str] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, tenant: str, prompt: Prompt) -> Prompt | None:
        """Who does not wait (any more) because of this: None, another prompt, or ``prompt`` itself.

        O(1) while there is room, else O(tenants that wait).
        """
        assert prompt not in self._tenants, "a prompt waits twice"
        refused = None
        if len(self) >= self._waiting_max:
            refused = self._makes_room_for(tenant)
            if refused is None:
                return prompt
            self.discard(refused)
        self._lines.setdefault(tenant, OrderedDict())[prompt] = None
        self._tenants[prompt] = tenant
        return refused

    def next(self) -> Prompt | None:
        """Takes whose turn it is; None when nobody waits."""
        if not self._lines:
            return None
        tenant, line = next(iter(self._lines.items()))
        prompt = next(iter(line))
        self._lines.move_to_end(tenant)
        self.discard(prompt)
        return prompt

    def discard(self, prompt: Prompt) -> None:
        """It waits no more, if it did."""
        tenant = self._tenants.pop(prompt, None)
        if tenant is None:
            return
        line = self._lines[tenant]
        del line[prompt]
        if not line:
            del self._lines[tenant]

    def _makes_room_for(self, tenant: str) -> Prompt | None:
        """The youngest of the longest line, of several that of the tenant whose turn comes last; None: nobody."""
        longest = max(reversed(self._lines.values()), key=len)
        would_have = len(self._lines.get(tenant, ())) + 1
        return next(reversed(longest)) if len(longest) - 1 >= would_have else None

    def check(self) -> None:
        """Every invariant, for tests."""
        assert len(self) <= self._waiting_max, "more wait than may"
        assert all(self._lines.values()), "a tenant without anything waiting is kept"
        found = {prompt: tenant for tenant, line in self._lines.items() for prompt in line}
        assert found == self._tenants, "a prompt is in the wrong line"
