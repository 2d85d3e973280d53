"""From streams to figures and verdicts, a table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ops.bench.survive.streams import Stream

SHOWN = ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms", "slow_gap_share", "hit_share")


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Nearest rank; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)] if ordered else None


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 2)


def window(streams: Sequence[Stream], begin_s: float, end_s: float, slow_gap_s: float) -> dict[str, Any]:
    """What clients saw in that time: gaps by when they ended, first tokens and hits by when the request was due."""
    gaps = [gap_s for s in streams for at_s, gap_s in s.gaps if begin_s <= at_s < end_s]
    due = [s for s in streams if begin_s <= s.at_s < end_s]
    firsts = [s.token_s[0] - s.at_s for s in due if s.token_s]
    hit = sum(any(gap_s > slow_gap_s for _, gap_s in s.gaps) for s in due)
    return {
        "tokens": len(gaps), "itl_p50_ms": in_ms(percentile(gaps, 50)), "itl_p99_ms": in_ms(percentile(gaps, 99)),
        "slow_gap_share": round(sum(g > slow_gap_s for g in gaps) / len(gaps), 5) if gaps else None,
        "requests": len(due), "ttft_p50_ms": in_ms(percentile(firsts, 50)),
        "ttft_p99_ms": in_ms(percentile(firsts, 99)), "hit_share": round(hit / len(due), 4) if due else None,
    }  # fmt: skip


def answers(times_s: Sequence[float]) -> dict[str, Any]:
    return {
        "count": len(times_s), "p50_ms": in_ms(percentile(times_s, 50)), "p99_ms": in_ms(percentile(times_s, 99)),
        "max_ms": in_ms(max(times_s, default=None)),
    }  # fmt: skip


def ends(streams: Iterable[Stream]) -> dict[str, int]:
    return dict(Counter(f"{s.end} {s.reason}".strip() for s in streams))


def verdicts(result: dict[str, Any], goals: dict[str, float]) -> dict[str, bool]:
    """What was measured against the goals; a goal whose part did not run is left out."""
    found = {}
    if "slow" in result:
        slow = result["slow"]
        found["slow_p99"] = slow["p99_factor"] <= goals["p99_factor"]
        found["slow_noticed"] = slow["noticed_after_s"] is not None
        found["slow_exact"] = slow["ends"] == {"OK": slow["sent"]} and slow["exact"]
    if "death" in result:
        gone, back = result["death"]["gone"], result["death"]["back"]
        found["death_answers"] = all(gone[who]["p99_ms"] <= goals["answer_ms"] for who in ("running", "new"))
        found["death_typed"] = set(gone["ends"]) <= {"OK", "UNAVAILABLE NO_ENDPOINT", "UNAVAILABLE REPLICA_FAILED"}
        found["back_exact"] = set(back["running_ends"]) <= {"OK", "UNAVAILABLE REPLICA_FAILED"} and back["exact"]
        found["back_goes_on"] = back["running_ends"].get("OK", 0) >= goals["goes_on_share"] * back["running"]
    if "silence" in result:
        silence = result["silence"]
        found["silence_moved"] = silence["pauses"]["count"] > 0 and silence["pauses"]["max_ms"] <= goals["pause_ms"]
        found["silence_exact"] = silence["ends"] == {"OK": silence["sent"]} and silence["exact"]
    if "storm" in result:
        storm = result["storm"]
        allowed = goals["retry_share"] * storm["sent"] + storm["free"]
        found["storm_retries"] = storm["retries"] <= allowed
        found["storm_typed"] = set(storm["ends"]) <= {"OK", "UNAVAILABLE NO_ENDPOINT", "UNAVAILABLE REPLICA_FAILED"}
        found["storm_answers"] = storm["answers"]["p99_ms"] <= goals["answer_ms"]
    return found


def table(result: dict[str, Any]) -> str:
    lines = []
    if "slow" in result:
        lines += [
            "| window | fleet | ITL p50 | p99 ms | TTFT p50 | p99 ms | slow gaps | hit |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, fleets in result["slow"]["windows"].items():
            for fleet, one in fleets.items():
                cells = [one[key] for key in SHOWN]
                lines.append(f"| {name} | {fleet} | " + " | ".join(map(str, cells)) + " |")
        lines.append(f"noticed after {result['slow']['noticed_after_s']} s; p99 factor {result['slow']['p99_factor']}")
    if "death" in result:
        gone, back = result["death"]["gone"], result["death"]["back"]
        lines.append(f"all dead, nobody waits: running {gone['running']}; new {gone['new']}; {gone['ends']}")
        lines.append(
            f"all dead, others come: {back['running_ends']}, going on after {back['resumed']}; "
            f"new meanwhile {back['new']}"
        )
    if "silence" in result:
        lines.append(f"silence: pauses {result['silence']['pauses']}; moved {result['silence']['moved']}")
    if "storm" in result:
        storm = result["storm"]
        lines.append(
            f"storm: {storm['sent']} sent, {storm['lost_attempts']:.0f} attempts, {storm['retries']:.0f} retries, "
            f"of which {storm['free']} are free; answers {storm['answers']}; {storm['ends']}"
        )
    return "\n".join(lines)


def plot(series: dict[str, Sequence[Stream]], marks: dict[str, float], bin_s: float, file: Path) -> None:
    """The 99th percentile between tokens, second by second, of each fleet."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, streams in series.items():
        gaps: dict[int, list[float]] = {}
        for stream in streams:
            for at_s, gap_s in stream.gaps:
                gaps.setdefault(int(at_s / bin_s), []).append(gap_s)
        points = [(bin_s * index, in_ms(percentile(found, 99))) for index, found in sorted(gaps.items())]
        axes.plot(*zip(*points, strict=True), label=name)
    for name, at_s in marks.items():
        axes.axvline(at_s, color="grey", linestyle=":")
        axes.text(at_s, 1.0, name, fontsize="small", transform=axes.get_xaxis_transform(), va="bottom")
    axes.set_xlabel("seconds")
    axes.set_ylabel("p99 between tokens, ms")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
