"""What each tenant was given, in virtual tokens. Pure.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with their weights:
a prompt's token counts once, a generated one twice, since it takes a step of its own and holds its KV until the end.
Each request is charged with what it is expected to cost when it leaves the queue, and corrected when it has ended:
nothing is counted per token.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

GENERATED_WEIGHT = 2.0
GENERATED_FIRST_GUESS = 64.0  # tokens of an answer before the first one has ended
GUESS_GAIN = 0.1  # how far one answer moves the expectation of the next
TENANTS_MAX = 4096  # accounts kept of tenants that neither wait nor run


@dataclass(slots=True)
class _Account:
    counter: float
    expected_generated: float
    live: int = 0  # requests that wait or run


class ServedTokens:
    """Counters by tenant; ``floor`` is that of the tenant served last, and what a newcomer begins with.

    A tenant that comes back is lifted to where the others are: what it did not use while it was away is lost, so
    nobody saves up. What it used beyond its share is kept until the others have caught up, for up to TENANTS_MAX
    tenants.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._away: OrderedDict[str, None] = OrderedDict()
        self._expected_generated = GENERATED_FIRST_GUESS
        self.floor = 0.0
        self.live = 0  # requests that wait or run, of all tenants

    def __len__(self) -> int:
        return len(self._accounts)

    def counter(self, tenant: str) -> float:
        account = self._accounts.get(tenant)
        return self.floor if account is None else account.counter

    def expected_cost(self, tenant: str, prompt_tokens: int, max_tokens: int) -> float:
        """Virtual tokens of a request, by what the tenant's answers have been so far; at least 1."""
        account = self._accounts.get(tenant)
        generated = self._expected_generated if account is None else account.expected_generated
        return max(1.0, cost(prompt_tokens, min(generated, max_tokens)))

    def entered(self, tenant: str, start: float | None = None) -> None:
        """One more request of ``tenant`` waits or runs; ``left`` ends that. A new account begins at ``start``."""
        account = self._accounts.get(tenant)
        if account is None:
            counter = self.floor if start is None else start
            account = self._accounts[tenant] = _Account(counter, self._expected_generated)
        account.live += 1
        self.live += 1
        self._away.pop(tenant, None)

    def left(self, tenant: str) -> None:
        account = self._accounts[tenant]
        account.live -= 1
        self.live -= 1
        assert account.live >= 0, "a request left twice"
        if account.live:
            return
        if account.counter <= self.floor:
            del self._accounts[tenant]  # says no more than a new one would
            return
        self._away[tenant] = None
        if len(self._away) > TENANTS_MAX:
            oldest, _ = self._away.popitem(last=False)
            del self._accounts[oldest]

    def lift(self, tenant: str, least: float) -> None:
        """A tenant that begins to wait is nowhere behind ``least``."""
        account = self._accounts[tenant]
        account.counter = max(account.counter, least)

    def charge(self, tenant: str, tokens: float) -> None:
        """Before it is charged for a request it is the tenant served last."""
        account = self._accounts[tenant]
        self.floor = max(self.floor, account.counter)
        account.counter += tokens

    def correct(self, tenant: str, tokens: float) -> None:
        """``tokens`` more than it was charged with, or fewer."""
        self._accounts[tenant].counter += tokens

    def learn(self, tenant: str, generated: int) -> None:
        """An answer that ran to its end had so many tokens."""
        account = self._accounts[tenant]
        account.expected_generated += GUESS_GAIN * (generated - account.expected_generated)
        self._expected_generated += GUESS_GAIN * (generated - self._expected_generated)


def cost(prompt_tokens: float, generated: float) -> float:
    """Virtual tokens of a request; of its prompt those that were computed."""
    return prompt_tokens + GENERATED_WEIGHT * generated
