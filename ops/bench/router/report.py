"""From runs to figures: medians over rounds, latency added over the direct way, a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ops.bench.router import cases

# What each scenario's cost is called, and how its table shows it.
COSTS = {
    "unary": ("cpu_us_per_request", "us / request"),
    "short_stream": ("cpu_us_per_request", "us / streamed request"),
    "paced": ("cpu_us_per_token", "us / token, paced"),
    "saturated": ("cpu_us_per_token", "us / token, saturated"),
    "closed": ("cpu_us_per_request", "us / request, closed loop"),
    "idle": ("bytes_per_stream", "bytes / idle stream"),
}
LATENCIES = ("unary", "short_stream", "paced")


def percentile_ms(values_s: list[float], percent: float) -> float:
    """Nearest rank, in milliseconds."""
    ordered = sorted(values_s)
    return 1e3 * ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)]


def condensed(run: dict[str, Any]) -> dict[str, Any]:
    """A run without its single latencies, which the percentiles stand for."""
    latencies = run.pop("latency_s", None)
    if latencies:
        run |= {"p50_ms": percentile_ms(latencies, 50), "p99_ms": percentile_ms(latencies, 99)}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in run.items()}


def summarise(runs: list[dict[str, Any]], workload: dict[str, Any]) -> dict[str, Any]:
    """By contender and scenario: medians over the rounds; ``added_``: over the direct one in the same round."""
    by_place = {(run["contender"], run["scenario"], run["round"]): run for run in runs}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        found[name] = {}
        for scenario in dict.fromkeys(run["scenario"] for run in runs if run["contender"] == name):
            own = [run for run in runs if (run["contender"], run["scenario"]) == (name, scenario)]
            entry = {
                key: round(statistics.median(run[key] for run in own), 3)
                for key, value in own[0].items()
                if isinstance(value, (int, float)) and key != "round" and all(key in run for run in own)
            }
            cost = (COSTS | cases.PROCESSES).get(scenario, ("",))[0]
            if cost:
                entry["range"] = [min(run[cost] for run in own), max(run[cost] for run in own)]
            direct = workload["direct"].get(name)
            pairs = [(run, by_place.get((direct, scenario, run["round"]))) for run in own] if direct else []
            for percentile in ("p50_ms", "p99_ms"):
                added = [run[percentile] - other[percentile] for run, other in pairs if other and percentile in run]
                if added:
                    entry[f"added_{percentile}"] = round(statistics.median(added), 3)
            found[name][scenario] = entry
    return found


def goals(summary: dict[str, Any], workload: dict[str, Any]) -> list[str]:
    """Each goal of the workload and what was seen."""
    lines = []
    for name, wanted in workload["goals"].items():
        if name == "linear":
            continue  # between two of us: cases.linear_goals
        for scenario, most in wanted.items():
            if ("unary" if scenario == "added_p50_ms" else scenario) not in workload["scenarios"]:
                continue
            if scenario == "rates":
                lines.append(cases.rate_goal(summary, name, most))
                continue
            if scenario == "added_p50_ms":
                seen = summary.get(name, {}).get("unary", {}).get("added_p50_ms")
            else:
                seen = summary.get(name, {}).get(scenario, {}).get(COSTS[scenario][0])
            verdict = "not measured" if seen is None else "reached" if seen <= most else "missed"
            lines.append(f"{name}: {scenario} {seen} (goal {most}): {verdict}")
    return lines


def table(summary: dict[str, Any]) -> str:
    lines = ["| contender | " + " | ".join(title for _, title in COSTS.values()) + " | requests / s, closed loop |"
             " tokens / message, saturated |"
             " added p50 / p99 ms, unary | added p50 / p99 ms, paced token |"]  # fmt: skip
    lines.append("|---|" + "---:|" * (len(COSTS) + 4))
    for name, of_one in summary.items():
        if not COSTS.keys() & of_one.keys():
            continue
        cells = [_cell(of_one.get(scenario, {}).get(cost)) for scenario, (cost, _) in COSTS.items()]
        cells.append(_cell(of_one.get("closed", {}).get("requests_s")))
        cells.append(_cell(of_one.get("saturated", {}).get("tokens_per_message")))
        for scenario in ("unary", "paced"):
            entry = of_one.get(scenario, {})
            cells.append(f"{_cell(entry.get('added_p50_ms'))} / {_cell(entry.get('added_p99_ms'))}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar for each contender and cost, with the goals as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    summary, goal = result["summary"], result["workload"]["goals"].get("ours", {})
    shown = [name for name in COSTS if any(name in of_one for of_one in summary.values())]
    more = cases.panels(summary)
    columns = max(1, min(6, len(shown) + len(more)))
    rows = -(-(len(shown) + len(more)) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 4.2 * rows), squeeze=False)
    places = list(grid.flat)
    for axes, panel in zip(places[len(shown) :], more, strict=False):
        wanted = goal.get(panel) if panel == "rates" else result["workload"]["goals"]["linear"].get(panel)
        cases.draw(axes, panel, summary, wanted)
    for axes in places[len(shown) + len(more) :]:
        axes.axis("off")
    for axes, scenario in zip(places, shown, strict=False):
        cost, title = COSTS[scenario]
        names = [name for name, of_one in summary.items() if scenario in of_one]
        bars = axes.bar(names, [summary[name][scenario][cost] for name in names], color="tab:blue")
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
        if scenario in goal:
            axes.axhline(goal[scenario], color="black", linestyle="dotted")
        axes.set_title(f"{scenario}: {title}", fontsize=9)
        axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"CPU of the process in the middle (dotted: goal); {machine['cpu']}, {machine['cores_used']} cores; commit "
        f"{result['commit'][:10]}{' with changes' if result['modified'] else ''}, {result['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
