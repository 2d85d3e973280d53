"""One run of load against one address, in a process of its own: JSON in on standard input, JSON out.

Open loop: requests leave when they are due, whether or not the others are back. The processes whose cost is looked at
are named by pid; their CPU time (user and system, all threads) is read from /proc at both ends of the measured part.
What a scenario names in ``each`` it has for every serving process.
Times are of CLOCK_MONOTONIC, in whose multiples of the pace the mocks tick: a token's lateness is the time since its
tick.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field

import uvloop

from ops.bench.router.clients import CONNECTIONS, Client, GrpcClient, HttpClient, LoadError
from ops.bench.router.report import percentile_ms
from ops.bench.router.usage import CpuTime, machine_busy_s, resident_bytes

START_DEADLINE_S = 60.0
LONG = 900_000  # tokens of a stream that is ended by the clock
LAG_MAX_S = 0.01  # of nine in ten requests of one rate; beyond it they came in other clumps than asked for


@dataclass(frozen=True)
class Target:
    """The processes whose cost is looked at; ``parent``: the one of them that serves nobody, only keeps the others."""

    pids: list[int]
    parent: int | None = None

    @property
    def serving(self) -> list[int]:
        return [pid for pid in self.pids if pid != self.parent]


@dataclass(frozen=True)
class Spent:
    """Between two looks: CPU seconds of each serving process and of the parent, of the whole machine, and wall time."""

    serving_s: list[float]
    parent_s: float
    machine_s: float
    wall_s: float

    @property
    def total_s(self) -> float:
        return sum(self.serving_s) + self.parent_s

    def figures(self) -> dict[str, float]:
        return {
            "cores": self.total_s / self.wall_s,
            "busiest_share": max(self.serving_s) / self.total_s if self.total_s else 1.0,
            "parent_us_s": 1e6 * self.parent_s / self.wall_s,
            "machine_cores": self.machine_s / self.wall_s,
        }


class Spending:
    """From now until ``since``."""

    def __init__(self, target: Target) -> None:
        self._serving = [CpuTime([pid]) for pid in target.serving]
        self._parent = None if target.parent is None else CpuTime([target.parent])
        self._machine_s, self._began_s = machine_busy_s(), time.monotonic()

    def since(self) -> Spent:
        return Spent(
            [cpu.seconds() for cpu in self._serving],
            0.0 if self._parent is None else self._parent.seconds(),
            machine_busy_s() - self._machine_s,
            time.monotonic() - self._began_s,
        )


@dataclass
class Seen:
    """What came back while it counted."""

    counting: bool = False
    tokens: int = 0
    messages: int = 0
    lateness_s: list[float] = field(default_factory=list)


class Arrivals:
    """Requests of one token that come at random, ``rate`` a second on average."""

    def __init__(self, client: Client, rng: random.Random, *, stream: bool = False) -> None:
        self._client, self._rng, self._stream = client, rng, stream
        self.taken_s: list[float] = []  # from when each was due to its answer
        self.lag_s: list[float] = []  # from when each was due to its leaving

    async def _one(self, due_s: float) -> None:
        self.lag_s.append(time.monotonic() - due_s)
        if self._stream:
            async for _ in self._client.stream((0, 0), 1):
                pass
        else:
            await self._client.whole((0, 0))
        self.taken_s.append(time.monotonic() - due_s)

    async def phase(self, rate: float, length_s: float) -> int:
        """How many were sent; all are back then."""
        self.taken_s, self.lag_s = [], []
        waiting: set[asyncio.Task[None]] = set()
        due_s, sent = time.monotonic(), 0
        end_s = due_s + length_s
        while (due_s := due_s + self._rng.expovariate(rate)) < end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(self._one(due_s))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            sent += 1
        if waiting:
            await asyncio.wait_for(asyncio.gather(*waiting), START_DEADLINE_S)
        return sent


async def requests(client: Client, scenario: dict, target: Target) -> dict:
    """Requests of one token, arriving at random: cost of each, and time until its answer."""
    arrivals = Arrivals(client, random.Random(scenario["seed"]), stream=scenario["kind"] == "short")
    await arrivals.phase(scenario["rate"], scenario["warm_up_s"])
    cpu = CpuTime(target.pids)
    sent = await arrivals.phase(scenario["rate"], scenario["seconds"])
    spent = cpu.seconds()
    return {"requests": sent, "cpu_us_per_request": 1e6 * spent / sent, "latency_s": arrivals.taken_s}


async def rates(client: Client, scenario: dict, target: Target) -> dict:
    """The cost of a request at several rates, for those that the load itself could keep up with."""
    arrivals = Arrivals(client, random.Random(scenario["seed"]))
    await arrivals.phase(scenario["rates"][0], scenario["warm_up_s"])
    found: dict[str, float] = {}
    for rate in scenario["rates"]:
        cpu, busy_before_s, began_s = CpuTime(target.pids), machine_busy_s(), time.monotonic()
        sent = await arrivals.phase(rate, scenario["seconds"])
        spent, busy_s = cpu.seconds(), machine_busy_s() - busy_before_s
        lag_ms = percentile_ms(arrivals.lag_s, 90)
        found |= {
            f"requests_at_{rate}": sent,
            f"lag_p90_ms_at_{rate}": lag_ms,
            f"lag_p99_ms_at_{rate}": percentile_ms(arrivals.lag_s, 99),
            f"machine_cores_at_{rate}": busy_s / (time.monotonic() - began_s),
            f"p50_ms_at_{rate}": percentile_ms(arrivals.taken_s, 50),
        }
        if lag_ms <= 1e3 * LAG_MAX_S:
            found[f"us_at_{rate}"] = 1e6 * spent / sent
    return found


async def closed(client: Client, scenario: dict, target: Target) -> dict:
    """Requests of one token, each client's next one when its last is back and ``think_ms`` on average have passed."""
    done, over = 0, False
    rng, think_s = random.Random(scenario["seed"]), scenario.get("think_ms", 0) / 1e3

    async def one() -> None:
        nonlocal done
        while not over:
            if think_s:
                await asyncio.sleep(rng.uniform(0, 2 * think_s))
            await client.whole((0, 0))
            done += 1

    running = [asyncio.create_task(one()) for _ in range(scenario["clients"])]
    await asyncio.sleep(scenario["warm_up_s"])
    spending, began = Spending(target), done
    await asyncio.sleep(scenario["seconds"])
    spent, requests_done, over = spending.since(), done - began, True
    await asyncio.wait_for(asyncio.gather(*running), START_DEADLINE_S)
    if not requests_done:
        raise LoadError("no request came back")
    return spent.figures() | {
        "requests": requests_done,
        "requests_s": requests_done / spent.wall_s,
        "cpu_us_per_request": 1e6 * spent.total_s / requests_done,
    }


async def streams(client: Client, scenario: dict, target: Target) -> dict:
    """Many streams at one pace, looked at while all of them run: cost of each token, and how late it came."""
    count, pace_ms = scenario["streams"], scenario["pace_ms"]
    seen, started = Seen(), asyncio.Semaphore(0)

    async def one() -> None:
        first = True
        async for tokens in client.stream((pace_ms, 0), LONG):
            if first:
                first = False
                started.release()
            if seen.counting:
                seen.tokens += tokens
                seen.messages += 1
                if pace_ms:
                    seen.lateness_s.append(time.monotonic() % (pace_ms / 1e3))

    running = [asyncio.create_task(one()) for _ in range(count)]
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            for _ in range(count):
                await started.acquire()
    except TimeoutError:
        raise LoadError(f"not every stream had its first token within {START_DEADLINE_S:.0f} s") from None
    await asyncio.sleep(scenario["warm_up_s"])
    spending = Spending(target)
    seen.counting = True
    await asyncio.sleep(scenario["seconds"])
    seen.counting = False
    spent = spending.since()
    broken = [task for task in running if task.done()]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    if broken or not seen.tokens:
        raise _ended_early(broken, count)
    return spent.figures() | {
        "tokens": seen.tokens,
        "tokens_s": seen.tokens / spent.wall_s,
        "offered_tokens_s": count * 1e3 / pace_ms if pace_ms else None,
        "tokens_per_message": seen.tokens / seen.messages,
        "cpu_us_per_token": 1e6 * spent.total_s / seen.tokens,
        "latency_s": seen.lateness_s,
    }


def _ended_early(broken: list[asyncio.Task[None]], count: int) -> LoadError:
    why = [" ".join(str(task.exception()).split()) for task in broken[:1] if not task.cancelled()]
    return LoadError(f"{len(broken)} of {count} streams ended early: {why}")


async def idle(client: Client, scenario: dict, target: Target) -> dict:
    """Streams whose first token does not come: memory of each, and what they cost while nothing happens."""
    count = scenario["streams"]
    await client.whole((0, 0))
    before = resident_bytes(target.pids)

    async def one() -> None:
        async for _ in client.stream((0, 600_000), LONG):
            raise LoadError("a token came")

    running = []
    for _ in range(count):
        running.append(asyncio.create_task(one()))
        if len(running) % 100 == 0:
            await asyncio.sleep(0.1)
    await asyncio.sleep(scenario["settle_s"])
    opened = resident_bytes(target.pids)
    cpu = CpuTime(target.pids)
    await asyncio.sleep(scenario["seconds"])
    spent = cpu.seconds()
    broken = [task for task in running if task.done()]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await asyncio.sleep(scenario["settle_s"])
    if broken:
        raise _ended_early(broken, count)
    return {
        "streams": count,
        "bytes_per_stream": (opened - before) / count,
        "bytes_per_stream_after": (resident_bytes(target.pids) - before) / count,
        "cores": spent / scenario["seconds"],
    }


async def rest(_client: Client, scenario: dict, target: Target) -> dict:
    """What it costs to be there: replicas' beats and loads, timers, and the parent's questions to its children."""
    await asyncio.sleep(scenario["warm_up_s"])
    spending = Spending(target)
    await asyncio.sleep(scenario["seconds"])
    spent = spending.since()
    return spent.figures() | {"cpu_us_s_per_process": 1e6 * sum(spent.serving_s) / spent.wall_s / len(spent.serving_s)}


KINDS = {
    "unary": requests, "short": requests, "rates": rates, "closed": closed, "streams": streams, "idle": idle,
    "rest": rest,
}  # fmt: skip


def for_each(scenario: dict, processes: int) -> dict:
    """The scenario for so many processes: what it names in ``each`` it has for every one of them."""
    return scenario | {name: count * processes for name, count in scenario.get("each", {}).items()}


async def run(config: dict) -> dict:
    target = Target(config["pids"], config.get("parent"))
    scenario = for_each(config["scenario"], len(target.serving))
    client: Client
    if config["protocol"] == "http":
        client = HttpClient(config["address"])
    else:
        client = GrpcClient(
            config["address"], ids=config["protocol"] == "grpc_ids", application=config.get("application", ""),
            connections=scenario.get("connections", CONNECTIONS),
        )  # fmt: skip
    try:
        return await KINDS[scenario["kind"]](client, scenario, target)
    finally:
        await client.close()


def main() -> None:
    json.dump(uvloop.run(run(json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
