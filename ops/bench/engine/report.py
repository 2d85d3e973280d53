"""From runs to figures: percentiles, summaries, a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ops.bench.engine.processes import ContenderError

PERCENTILES = (50, 90, 99)
RIVALS = ("vllm_served", "vllm_compiled")


def measures(answer: dict) -> dict:
    """Of one run: rates and latencies, from the driver's requests."""
    requests = answer["requests"]
    if not all(request["times_s"] for request in requests):
        raise ContenderError("a request has ended without a token")
    tokens = sum(len(request["token_ids"]) for request in requests)
    started = min(request["started_s"] for request in requests)
    wall_s = max(request["times_s"][-1] for request in requests) - started
    ttft = [request["times_s"][0] - request["started_s"] for request in requests]
    gaps = [
        later - earlier
        for request in requests
        for earlier, later in zip(request["times_s"], request["times_s"][1:], strict=False)
    ]
    return {
        "output_tokens": tokens,
        "wall_s": round(wall_s, 4),
        "output_tokens_s": round(tokens / wall_s, 2),
        "cpu_ms_per_token": round(1e3 * answer["cpu_s"] / tokens, 4),
        "ttft_ms": percentiles(ttft),
        "itl_ms": percentiles(gaps),
    }


def percentiles(values_s: list[float]) -> dict[str, float]:
    """In milliseconds; nearest rank."""
    ordered = sorted(values_s)
    return {f"p{p}": round(1e3 * ordered[max(0, -(-p * len(ordered) // 100) - 1)], 3) for p in PERCENTILES if ordered}


def summarise(runs: list[dict], start_ups: dict[str, list[float]], bounds: dict[int, float]) -> dict:
    """Medians over rounds; ``over``: the median of each round's ratio to a rival."""
    names = list(dict.fromkeys(run["contender"] for run in runs))
    found = {}
    for name in names:
        by_concurrency = {}
        for concurrency in dict.fromkeys(run["concurrency"] for run in runs):
            own = _rounds(runs, name, concurrency)
            if not own:
                continue
            rates = {number: run["output_tokens_s"] for number, run in own.items()}
            by_concurrency[concurrency] = {
                "output_tokens_s": statistics.median(rates.values()),
                "output_tokens_s_range": [min(rates.values()), max(rates.values())],
                "share_of_roofline": round(statistics.median(rates.values()) / bounds[concurrency], 3),
                "over": {rival: ratio(runs, name, rival, concurrency) for rival in RIVALS},
                "cpu_ms_per_token": statistics.median(run["cpu_ms_per_token"] for run in own.values()),
                "ttft_ms_p50": statistics.median(run["ttft_ms"]["p50"] for run in own.values()),
                "itl_ms_p50": statistics.median(run["itl_ms"]["p50"] for run in own.values()),
                "itl_ms_p99": statistics.median(run["itl_ms"]["p99"] for run in own.values()),
                "same_tokens": min(
                    (run["same_tokens"] for run in own.values() if run["same_tokens"] is not None), default=None
                ),
            }
        found[name] = {"start_up_s": round(statistics.median(start_ups[name]), 2), "by_concurrency": by_concurrency}
    return found


def ratio(runs: list[dict], name: str, rival: str, concurrency: int) -> float | None:
    """Output tokens/s of ``name`` by those of ``rival`` in the same round, the median; None where one did not run."""
    theirs, own = _rounds(runs, rival, concurrency), _rounds(runs, name, concurrency)
    found = [own[n]["output_tokens_s"] / theirs[n]["output_tokens_s"] for n in own if n in theirs]
    return round(statistics.median(found), 3) if found else None


def compare_pairs(runs: list[dict], start_ups: dict[str, list[float]], workload: dict) -> dict:
    """Each pair of the workload: ratios of throughput by concurrency, and of start-up, and what is asked of it."""
    goal, found = workload["goal"], {}
    for title, (name, rival) in workload["pairs"].items():
        starts = [statistics.median(start_ups[one]) if start_ups.get(one) else None for one in (name, rival)]
        levels = dict.fromkeys(run["concurrency"] for run in runs)
        found[title] = {
            "contender": name,
            "over": rival,
            "output_tokens_s": {level: ratio(runs, name, rival, level) for level in levels},
            "output_tokens_s_goal": goal["output_tokens_s"] if goal["pair"] == title else None,
            "start_up_s": starts,
            "start_up": None if None in starts else round(starts[0] / starts[1], 3),
            "start_up_goal": goal["start_up"] if goal["start_up_pair"] == title else None,
        }
    return found


def pair_table(pairs: dict) -> str:
    """Ratios; where a goal is looked at, it stands behind them."""
    levels = list(dict.fromkeys(level for pair in pairs.values() for level in pair["output_tokens_s"]))
    lines = ["| pair | ours / vLLM | " + " | ".join(f"x at {level} clients" for level in levels) + " | start-up x |"]
    lines.append("|---|---|" + "---:|" * (len(levels) + 1))
    for title, pair in pairs.items():
        cells = [_cell(pair["output_tokens_s"].get(level), pair["output_tokens_s_goal"], ">=") for level in levels]
        cells.append(_cell(pair["start_up"], pair["start_up_goal"], "<="))
        lines.append(f"| {title} | {pair['contender']} / {pair['over']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, goal: float | None, sign: str) -> str:
    shown = "-" if value is None else f"{value:.2f}"
    return shown if goal is None else f"{shown} (goal {sign} {goal})"


def _rounds(runs: list[dict], name: str, concurrency: int) -> dict[int, dict]:
    return {run["round"]: run for run in runs if run["contender"] == name and run["concurrency"] == concurrency}


def table(summary: dict) -> str:
    """Lines for a terminal or a page."""
    head = "| contender | start-up s | clients | output tokens/s | x vLLM served | x vLLM engine | of roofline |"
    head += " CPU ms/token |"
    head += " TTFT p50 ms | ITL p50 / p99 ms | same tokens |"
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for name, of_one in summary.items():
        for concurrency, f in of_one["by_concurrency"].items():
            same = "-" if f["same_tokens"] is None else f"{f['same_tokens']:.0%}"
            served, engine = (_cell(f["over"][rival], None, "") for rival in RIVALS)
            lines.append(
                f"| {name} | {of_one['start_up_s']:.1f} | {concurrency} | {f['output_tokens_s']:.0f} | {served} |"
                f" {engine} | {f['share_of_roofline']:.0%} | {f['cpu_ms_per_token']:.2f} | {f['ttft_ms_p50']:.1f} |"
                f" {f['itl_ms_p50']:.1f} / {f['itl_ms_p99']:.1f} | {same} |"
            )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Throughput with the machine's bound, the pairs with their goal, start-up, CPU time for each token."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    summary, bounds = result["summary"], result["roofline"]["bound_tokens_s"]
    levels = [str(level) for level in result["workload"]["requests"]]
    figure, (rates, ratios, costs, starts) = plt.subplots(1, 4, figsize=(19, 4.6), width_ratios=[3, 2, 3, 1.4])
    width = 0.8 / len(summary)
    for i, (name, of_one) in enumerate(summary.items()):
        by = {str(key): value for key, value in of_one["by_concurrency"].items()}
        places = [x + i * width for x, level in enumerate(levels) if level in by]
        for axes, key in ((rates, "output_tokens_s"), (costs, "cpu_ms_per_token")):
            values = [by[level][key] for level in levels if level in by]
            bars = axes.bar(places, values, width, label=name)
            axes.bar_label(bars, fmt="{:.0f}" if axes is rates else "{:.2g}", fontsize=7)
        starts.bar_label(starts.bar([i], [of_one["start_up_s"]]), fmt="{:.1f}", fontsize=7)
    for x, level in enumerate(levels):
        bound = {str(key): value for key, value in bounds.items()}[level]
        rates.hlines(bound, x - width / 2, x + 0.8 - width / 2, colors="black", linestyles="dotted")
    _plot_pairs(ratios, result["pairs"], levels)
    rates.set(title="output tokens/s (dotted: this machine's bound)", yscale="log")
    costs.set(title="CPU milliseconds for each output token", yscale="log")
    starts.set(title="seconds to the first token", xticks=[])
    for axes in (rates, costs):
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(levels))], [f"{level} clients" for level in levels])
    rates.legend(fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores_used']} cores, {result['workload']['dtype']}; "
        f"commit {result['commit'][:10]}{' with changes' if result['modified'] else ''}, {result['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _plot_pairs(axes: Any, pairs: dict, levels: list[str]) -> None:
    """The ratios of throughput, and a line at the goal."""
    width = 0.8 / len(pairs)
    for i, (title, pair) in enumerate(pairs.items()):
        by = {str(level): value for level, value in pair["output_tokens_s"].items() if value is not None}
        places = [x + i * width for x, level in enumerate(levels) if level in by]
        label = f"{title}: {pair['contender']} / {pair['over']}"
        if pair["output_tokens_s_goal"] is not None:
            axes.axhline(pair["output_tokens_s_goal"], color="black", linestyle="dotted")
            label += f" (goal {pair['output_tokens_s_goal']})"
        bars = axes.bar(places, [by[level] for level in levels if level in by], width, label=label)
        axes.bar_label(bars, fmt="{:.2f}", fontsize=7)
    axes.set(title="output tokens/s, ours by vLLM's")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(levels))], [f"{level} clients" for level in levels])
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7)
