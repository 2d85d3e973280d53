"""Load as clients make it: most requests end well, some are cancelled, wrong, or late."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.client import AsyncClient, Completion
from cluster.domain.errors import ClusterError

PROMPTS = (
    "Return a new list containing",
    "This module provides",
    "If the file does not exist,",
    "Raises ValueError if the argument is not",
    "The default value of this option is used when",
)
CANCEL_AFTER_CHUNKS = 3
REQUEST_DEADLINE_S = 60.0
IN_FLIGHT = 24


@dataclass(slots=True)
class Load:
    """Requests at a steady pace for ``seconds``; ``happenings``: (seconds from the start, what is done then)."""

    router_address: str
    seconds: float
    pace_s: float = 0.12
    happenings: tuple[tuple[float, Callable[[], None]], ...] = ()
    ended: Counter[str] = field(default_factory=Counter)

    def run(self) -> Counter[str]:
        """How many requests ended in which way, as the clients saw it."""
        asyncio.run(self._run())
        return self.ended

    async def _run(self) -> None:
        rng = random.Random(7)
        loop = asyncio.get_running_loop()
        began_s, room = loop.time(), asyncio.Semaphore(IN_FLIGHT)
        async with AsyncClient(self.router_address) as client, asyncio.TaskGroup() as tasks:
            for at_s, happening in self.happenings:
                tasks.create_task(self._later(at_s, happening))
            number = 0
            while loop.time() - began_s < self.seconds:
                await room.acquire()
                number += 1
                tasks.create_task(self._one(client, number, rng)).add_done_callback(lambda _: room.release())
                await asyncio.sleep(rng.expovariate(1 / self.pace_s))

    async def _later(self, at_s: float, happening: Callable[[], None]) -> None:
        await asyncio.sleep(at_s)
        await asyncio.to_thread(happening)

    async def _one(self, client: AsyncClient, number: int, rng: random.Random) -> None:
        kind = {5: "cancelled", 11: "refused", 17: "late"}.get(number % 20, "whole")
        prompt, max_tokens = rng.choice(PROMPTS) * rng.choice((1, 1, 4)), rng.choice((8, 32, 96, 192))
        if kind == "refused":
            max_tokens = 1_000_000
        timeout_s = 0.2 if kind == "late" else REQUEST_DEADLINE_S
        temperature = rng.choice((0.0, 0.8))
        chunks, outcome = 0, "cancelled"
        stream = client.generate(
            prompt, max_tokens=max_tokens, temperature=temperature, timeout_s=timeout_s, ignore_eos=True
        )
        try:
            async for event in stream:
                chunks += 1
                if isinstance(event, Completion):
                    outcome = "completed"
                elif kind == "cancelled" and chunks >= CANCEL_AFTER_CHUNKS:
                    break
        except ClusterError as error:
            outcome = error.reason
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        self.ended[outcome] += 1
