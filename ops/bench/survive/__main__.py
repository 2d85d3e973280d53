"""What clients see when replicas become slow, die, fall silent or break again and again: see METHODOLOGY.md.

ops/bench/survive/measure [--quick] [--only slow,death,silence,storm] [--name NAME]

Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
import yaml

from ops.bench import provenance
from ops.bench.survive import report, streams
from ops.bench.survive.fleet import Fleet
from ops.bench.survive.streams import Stream

HERE = Path(__file__).parent
PARTS = ("slow", "death", "silence", "storm")
LOOK_S = 0.1  # between two looks at the router's metrics
SLOW_GAPS = 3.0  # a gap of so many healthy steps is a slow one


async def slow(workload: dict[str, Any], folder: Path, picture: Path) -> dict[str, Any]:
    """Two fleets with the same arrivals at the same time; a replica of one of them becomes slow."""
    plan, sizes = workload["slow"], workload["fleet"]
    end_s = plan["before_s"] + plan["settle_s"] + plan["after_s"]
    sent = streams.arrivals(workload["seed"], plan["rate"], 0.0, end_s, plan["mean_tokens"])
    both = {"with a slow replica": sent, "healthy": copy.deepcopy(sent)}
    noticed_s: list[float] = []
    async with Fleet(folder / "a", **sizes, router={}) as ill, Fleet(folder / "b", **sizes, router={}) as sound:
        begin_s = time.monotonic()
        loads = [
            asyncio.create_task(streams.run(fleet.address, sent, begin_s))
            for fleet, sent in zip((ill, sound), both.values(), strict=True)
        ]
        await asyncio.sleep(plan["before_s"])
        ill.replicas[-1].tell("step_ms", sizes["step_ms"] * plan["factor"])
        turned_s = time.monotonic() - begin_s
        while not noticed_s and not all(load.done() for load in loads):
            await asyncio.sleep(LOOK_S)
            standings = await ill.series("cluster_router_endpoint_standing")
            if any(value and f'{sizes["replicas"] - 1}",standing="slow"' in name for name, value in standings.items()):
                noticed_s.append(time.monotonic() - begin_s)
        await asyncio.gather(*loads)
        false_alarms = sum(v for k, v in (await sound.series("cluster_router_ejections_total")).items() if "slow" in k)
    gap_s = SLOW_GAPS * sizes["step_ms"] / 1e3
    settled_s = turned_s + plan["settle_s"]
    bounds = {
        "before": (1.0, turned_s), "settling": (turned_s, settled_s), "settled": (settled_s, end_s),
        "from then on": (turned_s, end_s),
    }  # fmt: skip
    windows = {
        name: {fleet: report.window(found, *bound, gap_s) for fleet, found in both.items()}
        for name, bound in bounds.items()
    }
    marks = {"slow": turned_s} | ({"noticed": noticed_s[0]} if noticed_s else {}) | {"settled": settled_s}
    report.plot(both, marks, 1.0, picture)
    p99 = [windows["settled"][fleet]["itl_p99_ms"] for fleet in both]
    return {
        "sent": len(sent), "ends": report.ends(sent), "exact": all(s.exact for s in sent), "windows": windows,
        "noticed_after_s": round(noticed_s[0] - turned_s, 2) if noticed_s else None,
        "p99_factor": round(p99[0] / p99[1], 3), "false_alarms_of_the_healthy": false_alarms,
    }  # fmt: skip


def _death_load(workload: dict[str, Any]) -> tuple[list[Stream], list[Stream]]:
    """Streams that will run when everything dies, and new ones all the time."""
    plan = workload["death"]
    running = [Stream(0.01 * index, plan["stream_tokens"]) for index in range(plan["streams"])]
    return running, streams.arrivals(workload["seed"], plan["rate"], 0.0, plan["end_s"], plan["mean_tokens"])


async def gone(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All replicas are killed and none comes back; nobody waits for one."""
    plan, sizes = workload["death"], workload["fleet"]
    running, new = _death_load(workload)
    # Twice the slots: what is answered late would be a matter of the router, not of its queue.
    async with Fleet(folder / "gone", **sizes | {"slots": 4 * sizes["slots"]}, router={"failover_wait_s": 0}) as fleet:
        begin_s = time.monotonic()
        load = asyncio.create_task(streams.run(fleet.address, running + new, begin_s))
        await asyncio.sleep(plan["kill_s"])
        died_s = await fleet.kill_all() - begin_s
        await load
        lost, refused = await losses_and_refusals(fleet)
    late = [s for s in new if s.sent_s > died_s]
    open_then = [s for s in (*running, *new) if s.sent_s <= died_s < s.ended_s]
    return {
        "sent": len(running) + len(new), "lost_attempts": lost, "retries_refused": refused,
        "running": report.answers([s.ended_s - died_s for s in open_then]),
        "new": report.answers([s.ended_s - s.sent_s for s in late]), "ends": report.ends((*running, *new)),
        "with_advice": sum(s.retry_after_s is not None for s in (*late, *open_then)),
    }  # fmt: skip


async def back(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All replicas are killed, and others come after a while: streams wait for them, new requests do not."""
    plan, sizes = workload["death"], workload["fleet"]
    running, new = _death_load(workload)
    async with Fleet(folder / "back", **sizes | {"slots": 4 * sizes["slots"]}, router={}) as fleet:
        spare = await fleet.spawn()
        begin_s = time.monotonic()
        load = asyncio.create_task(streams.run(fleet.address, running + new, begin_s))
        await asyncio.sleep(plan["kill_s"])
        died_s = await fleet.kill_all() - begin_s
        await asyncio.sleep(begin_s + plan["back_s"] - time.monotonic())
        fleet.push(spare)
        pushed_s = time.monotonic() - begin_s
        await load
    resumed = [min(t for t in s.token_s if t > pushed_s) - pushed_s for s in running if s.token_s[-1] > pushed_s]
    late = [s for s in new if died_s < s.sent_s < pushed_s]
    return {
        "running": len(running), "running_ends": report.ends(running),
        "exact": all(s.exact for s in (*running, *new) if s.end == "OK"), "resumed": report.answers(resumed),
        "new": report.answers([s.ended_s - s.sent_s for s in late]), "new_ends": report.ends(late),
        "after": report.ends(s for s in new if s.sent_s > pushed_s + 1.0),
    }  # fmt: skip


async def silence(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One replica is stopped under its streams: as when a network is cut, nothing breaks and nothing comes."""
    plan, sizes = workload["silence"], workload["fleet"]
    running = [Stream(0.01 * index, plan["stream_tokens"]) for index in range(plan["streams"])]
    async with Fleet(folder / "silence", **sizes | {"slots": 4 * sizes["slots"]}, router={}) as fleet:
        begin_s = time.monotonic()
        load = asyncio.create_task(streams.run(fleet.address, running, begin_s))
        await asyncio.sleep(plan["stop_s"])
        fleet.replicas[0].stop()
        await load
        moved = await fleet.series("cluster_router_failovers_total")
    waits = [max(gap_s for _, gap_s in s.gaps) for s in running]
    return {
        "sent": len(running), "ends": report.ends(running), "exact": all(s.exact for s in running),
        "moved": {k: v for k, v in moved.items() if v},
        "pauses": report.answers([wait_s for wait_s in waits if wait_s > plan["pause_s"]]),
    }  # fmt: skip


async def storm(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every session breaks with every step: what is tried again has a budget, and the answer comes at once."""
    plan, sizes = workload["storm"], workload["fleet"]
    sent = streams.arrivals(workload["seed"], plan["rate"], 0.0, plan["seconds"], plan["mean_tokens"])
    async with Fleet(folder / "storm", **sizes, router={}) as fleet:
        for replica in fleet.replicas:
            replica.tell("breaks", 1)
        # What the first break of each replica grants is used up, and the budget with it, before anything is counted.
        while await fleet.total("cluster_router_retries_refused_total") < plan["refused_first"]:
            first = [Stream(0.0, plan["mean_tokens"]) for _ in range(plan["first"])]
            await streams.run(fleet.address, first, time.monotonic())
        before = await losses_and_refusals(fleet)
        begin_s = time.monotonic()
        await streams.run(fleet.address, sent, begin_s)
        took_s = time.monotonic() - begin_s
        lost, refused = (after - b for after, b in zip(await losses_and_refusals(fleet), before, strict=True))
    last_word_s = [s.ended_s - (s.token_s[-1] if s.token_s else s.sent_s) for s in sent if s.end != "OK"]
    return {
        "sent": len(sent), "lost_attempts": lost, "retries": lost - refused,
        "free": round(1.0 + took_s, 1), "answers": report.answers(last_word_s),
        "ends": report.ends(sent),
    }  # fmt: skip


async def losses_and_refusals(fleet: Fleet) -> tuple[float, float]:
    """Attempts whose replica broke; and those of them that were not followed by another one."""
    return await fleet.total("cluster_router_failovers_total"), await fleet.total(
        "cluster_router_retries_refused_total"
    )


async def measure(workload: dict[str, Any], only: set[str], picture: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="survive-bench-") as name:
        folder = Path(name)
        if "slow" in only:
            result["slow"] = await slow(workload, folder, picture)
        if "death" in only:
            result["death"] = {"gone": await gone(workload, folder), "back": await back(workload, folder)}
        if "silence" in only:
            result["silence"] = await silence(workload, folder)
        if "storm" in only:
            result["storm"] = await storm(workload, folder)
    return result


def parts(named: str) -> set[str]:
    """Of a list by comma."""
    unknown = sorted(set(named.split(",")) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no part is called {unknown[0]!r}; parts are {','.join(PARTS)}")
    return set(named.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the slow replica for 25 s instead of 70")
    parser.add_argument("--only", type=parts, default=set(PARTS), help=f"of {','.join(PARTS)}, by comma")
    parser.add_argument("--name", default="latest", help="of the result files")
    given = parser.parse_args()
    workload = yaml.safe_load((HERE / "workload.yaml").read_text())
    if given.quick:
        for part, changes in workload["quick"].items():
            workload[part] |= changes
    path = HERE / "results" / f"{given.name}.json"
    path.parent.mkdir(exist_ok=True)
    result = provenance.facts() | {"workload": workload}
    result |= uvloop.run(measure(workload, given.only, path.with_suffix(".png")))
    result["held"] = report.verdicts(result, workload["goals"])
    provenance.write(path, result)
    print(report.table(result))
    print(json.dumps(result["held"]))
    return 0 if all(result["held"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
