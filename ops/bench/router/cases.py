"""The cases that are no single bar: the cost of a request by rate, and the cost by the number of processes."""

from __future__ import annotations

import statistics
from typing import Any

RATE_KEY = "us_at_"
# The scenarios of a router in several processes: the cost that is looked at, and what it is.
PROCESSES = {
    "processes_paced": ("cpu_us_per_token", "us / token"),
    "processes_closed": ("cpu_us_per_request", "us / request"),
    "processes_rest": ("cpu_us_s_per_process", "us / s of one process at rest"),
}
ONE, MANY = "ours", "ours_4"
FULL_SHARE = 0.95  # of the machine's cores; with more of them in use, who waits for a core says nothing of itself


def rates_of(summary: dict[str, Any]) -> list[int]:
    """Those that any contender was asked for, in order."""
    entries = [of_one.get("rates", {}) for of_one in summary.values()]
    return sorted({int(key.rpartition("_")[2]) for entry in entries for key in entry if key.startswith("requests_at_")})


def curve(summary: dict[str, Any], name: str) -> dict[int, float]:
    """Microseconds of a request by rate; without the rates that the load did not keep up with in some round."""
    entry = summary.get(name, {}).get("rates", {})
    return {rate: entry[f"{RATE_KEY}{rate}"] for rate in rates_of(summary) if f"{RATE_KEY}{rate}" in entry}


def rate_goal(summary: dict[str, Any], name: str, most: float) -> str:
    """At which rates ``name`` keeps to ``most`` microseconds a request, and at which it does not."""
    found = curve(summary, name)
    if not found:
        return f"{name}: rates None (goal {most}): not measured"
    seen = ", ".join(f"{cost:,.0f} at {rate}/s" for rate, cost in found.items())
    reached = [f"{rate}/s" for rate, cost in found.items() if cost <= most]
    verdict = "reached" if len(reached) == len(found) else f"reached at {', '.join(reached)}" if reached else "missed"
    return f"{name}: rates {seen} (goal {most}): {verdict}"


def linear_goals(
    runs: list[dict[str, Any]], goals: dict[str, float], cores: int
) -> dict[str, dict[str, float | str | None]]:
    """By scenario: the median over rounds of the cost with many processes by that with one, and the verdict."""
    found: dict[str, dict[str, float | str | None]] = {}
    for scenario, most in goals.items():
        own = {(run["contender"], run["round"]): run for run in runs if run["scenario"] == scenario}
        cost = PROCESSES[scenario][0]
        pairs = [
            (run, own[ONE, number]) for (name, number), run in own.items() if name == MANY and (ONE, number) in own
        ]
        ratio = round(statistics.median(many[cost] / one[cost] for many, one in pairs), 3) if pairs else None
        full = [run for pair in pairs for run in pair if run["machine_cores"] > FULL_SHARE * cores]
        if ratio is None:
            verdict = "not measured"
        elif full:
            verdict = "not judged: the machine's cores were full"
        else:
            verdict = "reached" if ratio <= most else "missed"
        found[scenario] = {"ratio": ratio, "goal": most, "verdict": verdict}
    return found


def linear_lines(found: dict[str, dict[str, float | str | None]]) -> list[str]:
    return [
        f"{MANY} / {ONE}: {scenario} {one['ratio']} (goal {one['goal']}): {one['verdict']}"
        for scenario, one in found.items()
    ]


def tables(summary: dict[str, Any]) -> str:
    """Both cases, as far as they were measured."""
    lines: list[str] = []
    rates = rates_of(summary)
    if rates:
        lines += ["", "| us / request at | " + " | ".join(f"{rate}/s" for rate in rates) + " | load's lag p90 ms |"]
        lines.append("|---|" + "---:|" * (len(rates) + 1))
        for name, of_one in summary.items():
            if "rates" in of_one:
                found, entry = curve(summary, name), of_one["rates"]
                cells = [f"{found[rate]:,.0f}" if rate in found else "-" for rate in rates]
                lags = " / ".join(f"{entry[f'lag_p90_ms_at_{rate}']:.1f}" for rate in rates)
                lines.append(f"| {name} | " + " | ".join(cells) + f" | {lags} |")
    several = [name for name, of_one in summary.items() if any(scenario in of_one for scenario in PROCESSES)]
    if several:
        lines += ["", "| processes | " + " | ".join(title for _, title in PROCESSES.values()) + _MORE_TITLES]
        lines.append("|---|" + "---:|" * (len(PROCESSES) + 3))
        lines += [f"| {name} | " + " | ".join(_processes_cells(summary[name])) + " |" for name in several]
    return "\n".join(lines)


_MORE_TITLES = " | parent at rest, us / s | machine's cores, paced / closed | tokens / message |"


def _processes_cells(of_one: dict[str, Any]) -> list[str]:
    cells = [_figure(of_one.get(scenario, {}).get(cost), 1) for scenario, (cost, _) in PROCESSES.items()]
    cells.append(_figure(of_one.get("processes_rest", {}).get("parent_us_s"), 0))
    paced, closed = of_one.get("processes_paced", {}), of_one.get("processes_closed", {})
    cells.append(f"{_figure(paced.get('machine_cores'), 2)} / {_figure(closed.get('machine_cores'), 2)}")
    return [*cells, _figure(paced.get("tokens_per_message"), 2)]


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def panels(summary: dict[str, Any]) -> list[str]:
    """Those that there is anything for, by what ``draw`` calls them."""
    found = ["rates"] if rates_of(summary) else []
    return found + [scenario for scenario in PROCESSES if any(scenario in of_one for of_one in summary.values())]


def draw(axes: Any, panel: str, summary: dict[str, Any], goal: float | None) -> None:
    """A line for each contender over the rate, or a bar for each number of processes."""
    if panel == "rates":
        for name in summary:
            if found := curve(summary, name):
                axes.plot(list(found), list(found.values()), marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xticks(rates_of(summary), [str(rate) for rate in rates_of(summary)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        axes.set_title("rates: us / request by requests / s", fontsize=9)
        if goal is not None:
            axes.axhline(goal, color="black", linestyle="dotted")
        return
    cost, title = PROCESSES[panel]
    names = [name for name, of_one in summary.items() if panel in of_one]
    axes.bar_label(axes.bar(names, [summary[name][panel][cost] for name in names]), fmt="{:,.0f}", fontsize=7)
    if goal is not None and ONE in names:
        axes.axhline(goal * summary[ONE][panel][cost], color="black", linestyle="dotted")
    axes.set_title(f"{panel}: {title}", fontsize=9)
