"""From runs to figures: percentiles, summaries, a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

PERCENTILES = (50, 90, 99)
GOAL_OVER = "vllm_compiled"


def measures(answer: dict) -> dict:
    """Of one run: rates and latencies, from the driver's requests."""
    requests = answer["requests"]
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
    """Medians over rounds; ``over`` is the median of each round's ratio to vLLM compiled."""
    names = list(dict.fromkeys(run["contender"] for run in runs))
    found = {}
    for name in names:
        by_concurrency = {}
        for concurrency in dict.fromkeys(run["concurrency"] for run in runs):
            own = _rounds(runs, name, concurrency)
            if not own:
                continue
            rates = {number: run["output_tokens_s"] for number, run in own.items()}
            rivals = {n: run["output_tokens_s"] for n, run in _rounds(runs, GOAL_OVER, concurrency).items()}
            ratios = [rates[number] / rivals[number] for number in rates if number in rivals]
            by_concurrency[concurrency] = {
                "output_tokens_s": statistics.median(rates.values()),
                "output_tokens_s_range": [min(rates.values()), max(rates.values())],
                "share_of_roofline": round(statistics.median(rates.values()) / bounds[concurrency], 3),
                "over_vllm_compiled": round(statistics.median(ratios), 3) if ratios else None,
                "cpu_ms_per_token": statistics.median(run["cpu_ms_per_token"] for run in own.values()),
                "ttft_ms_p50": statistics.median(run["ttft_ms"]["p50"] for run in own.values()),
                "itl_ms_p50": statistics.median(run["itl_ms"]["p50"] for run in own.values()),
                "itl_ms_p99": statistics.median(run["itl_ms"]["p99"] for run in own.values()),
                "same_tokens": min(
                    (run["same_tokens"] for run in own.values() if run["same_tokens"] is not None), default=None
                ),
            }
        found[name] = {"start_up_s": round(statistics.median(start_ups[name]), 2), "by_concurrency": by_concurrency}
    rival = found.get(GOAL_OVER)
    for of_one in found.values():
        of_one["start_up_over_vllm_compiled"] = round(of_one["start_up_s"] / rival["start_up_s"], 3) if rival else None
    return found


def _rounds(runs: list[dict], name: str, concurrency: int) -> dict[int, dict]:
    return {run["round"]: run for run in runs if run["contender"] == name and run["concurrency"] == concurrency}


def table(summary: dict) -> str:
    """Lines for a terminal or a page."""
    head = "| contender | start-up s | clients | output tokens/s | x vLLM compiled | of roofline | CPU ms/token |"
    head += " TTFT p50 ms | ITL p50 / p99 ms | same tokens |"
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for name, of_one in summary.items():
        for concurrency, f in of_one["by_concurrency"].items():
            same = "-" if f["same_tokens"] is None else f"{f['same_tokens']:.0%}"
            ratio = "-" if f["over_vllm_compiled"] is None else f"{f['over_vllm_compiled']:.2f}"
            lines.append(
                f"| {name} | {of_one['start_up_s']:.1f} | {concurrency} | {f['output_tokens_s']:.0f} | {ratio} |"
                f" {f['share_of_roofline']:.0%} | {f['cpu_ms_per_token']:.2f} | {f['ttft_ms_p50']:.1f} |"
                f" {f['itl_ms_p50']:.1f} / {f['itl_ms_p99']:.1f} | {same} |"
            )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Throughput with the machine's bound, start-up, CPU time for each token."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    summary, bounds = result["summary"], result["roofline"]["bound_tokens_s"]
    levels = [str(level) for level in result["workload"]["requests"]]
    figure, (rates, costs, starts) = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=[3, 3, 1.4])
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
