"""A plan, or the lack of one, for people (rich) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.checkpoint.tensors import parameter_count
from cluster.domain.errors import NoFeasiblePlan
from cluster.domain.parallel_layout import Placement
from cluster.domain.quantities import format_bytes, format_seconds
from cluster.planner.memory import RankLedger
from cluster.planner.plan import Candidate, Plan

# More rows than this are for --json.
_MAX_ROWS = 64


def render_plan(plan: Plan) -> RenderableType:
    """What was chosen and why, every rank's bytes, every candidate's verdict."""
    return Group(_summary(plan), _ledger_table(plan), _candidate_table(plan.candidates))


def render_no_plan(error: NoFeasiblePlan) -> RenderableType:
    """Every candidate with its reason, and the smallest change that would fit."""
    table = Table(title="Layouts that were considered", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for layout, reason in error.candidates[:_MAX_ROWS]:
        table.add_row(layout, reason)
    parts: list[RenderableType] = [Text(str(error), style="bold")]
    if error.candidates:
        parts.append(table)
    if error.smallest_change:
        parts.append(Text(f"Smallest change that fits: {error.smallest_change}"))
    return Group(*parts)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan in JSON types; bytes and seconds as plain numbers."""
    return {
        "feasible": True,
        "model": plan.model,
        "architecture": plan.spec.architecture,
        "parameters": _parameters(plan),
        "device": plan.device.name,
        "dtype": plan.dtype.value,
        "tensor_parallel_size": plan.layout.tensor_parallel_size,
        "pipeline_parallel_size": plan.layout.pipeline_parallel_size,
        "world_size": plan.layout.world_size,
        "stages": [{"first_layer": s.start, "last_layer": s.stop - 1} for s in plan.stages],
        "max_model_len": plan.max_model_len,
        "block_size": plan.block_size,
        "kv_blocks": plan.kv_blocks,
        "max_concurrent_tokens": plan.max_concurrent_tokens,
        "expected": {
            "ttft_s": plan.cost.ttft_s,
            "tpot_s": plan.cost.tpot_s,
            "prompt_tokens": plan.cost.prompt_tokens,
        },
        "reason": plan.reason,
        "ranks": [_ledger_json(ledger) for ledger in plan.ledgers],
        "placements": [_placement_json(placement) for placement in plan.placements],
        "candidates": [_candidate_json(candidate) for candidate in plan.candidates],
    }


def no_plan_to_json(error: NoFeasiblePlan) -> dict[str, Any]:
    """The same for a refusal."""
    return {
        "feasible": False,
        "error": str(error),
        "smallest_change": error.smallest_change,
        "candidates": [{"layout": layout, "reason": reason} for layout, reason in error.candidates],
    }


def _parameters(plan: Plan) -> int:
    return parameter_count(plan.spec)


def _summary(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{plan.model} ({plan.spec.architecture}, {_parameters(plan):,} parameters)")
    table.add_row("layout", f"{plan.layout}: {plan.layout.world_size} x {plan.device.name}, {plan.dtype.value}")
    table.add_row("because", plan.reason)
    table.add_row("length", f"{plan.max_model_len:,} tokens of prompt and output")
    table.add_row("KV cache", f"{plan.kv_blocks:,} blocks = {plan.max_concurrent_tokens:,} tokens at once")
    table.add_row(
        "at best",
        f"first token after {format_seconds(plan.cost.ttft_s)} ({plan.cost.prompt_tokens} prompt tokens), "
        f"then one every {format_seconds(plan.cost.tpot_s)}",
    )
    for index, placement in enumerate(plan.placements[:_MAX_ROWS]):
        table.add_row(f"replica {index}", _placement_text(placement))
    return table


def _placement_text(placement: Placement) -> str:
    parts = []
    for node_id in placement.node_ids:
        ranks = [rank.rank for rank in placement.ranks if rank.node_id == node_id]
        spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        parts.append(f"{spread} on {node_id}")
    return ", ".join(parts)


def _ledger_table(plan: Plan) -> Table:
    table = Table(title="Bytes of each rank", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("ranks", "stage", "layers", "weights", "working", "reserve", "KV cache", "total", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for first, last, cells in _runs(plan.ledgers)[:_MAX_ROWS]:
        table.add_row(str(first) if first == last else f"{first}-{last}", *cells)
    return table


def _runs(ledgers: Iterable[RankLedger]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Neighbouring ranks whose figures read alike, as (first, last, cells)."""
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for ledger in ledgers:
        cells = _cells(ledger)
        if runs and runs[-1][2] == cells:
            runs[-1] = (runs[-1][0], ledger.rank, cells)
        else:
            runs.append((ledger.rank, ledger.rank, cells))
    return runs


def _cells(ledger: RankLedger) -> tuple[str, ...]:
    amounts = (
        ledger.weight_bytes,
        ledger.activation_bytes + ledger.rotary_bytes,
        ledger.reserve_bytes,
        ledger.kv_bytes,
        ledger.total_bytes,
        ledger.budget_bytes,
    )
    layers = f"{ledger.layers.start}-{ledger.layers.stop - 1}"
    return (str(ledger.stage), layers, *(format_bytes(amount) for amount in amounts))


def _candidate_table(candidates: tuple[Candidate, ...]) -> Table:
    table = Table(title="Layouts that were considered", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    table.add_column("time per token", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for candidate in candidates[:_MAX_ROWS]:
        time = format_seconds(candidate.cost.tpot_s) if candidate.cost else ""
        table.add_row(f"{candidate.layout} on {candidate.device}", time, candidate.verdict)
    return table


def _ledger_json(ledger: RankLedger) -> dict[str, Any]:
    return {
        "rank": ledger.rank,
        "stage": ledger.stage,
        "first_layer": ledger.layers.start,
        "last_layer": ledger.layers.stop - 1,
        "parameters": ledger.parameters,
        "weight_bytes": ledger.weight_bytes,
        "rotary_bytes": ledger.rotary_bytes,
        "activation_bytes": ledger.activation_bytes,
        "loading_bytes": ledger.loading_bytes,
        "reserve_bytes": ledger.reserve_bytes,
        "kv_bytes_per_token": ledger.kv_bytes_per_token,
        "kv_bytes": ledger.kv_bytes,
        "total_bytes": ledger.total_bytes,
        "budget_bytes": ledger.budget_bytes,
        "read_bytes": ledger.read_bytes,
    }


def _placement_json(placement: Placement) -> list[dict[str, Any]]:
    return [{"rank": rank.rank, "node": rank.node_id, "host": rank.host} for rank in placement.ranks]


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "tensor_parallel_size": candidate.layout.tensor_parallel_size,
        "pipeline_parallel_size": candidate.layout.pipeline_parallel_size,
        "device": candidate.device,
        "fits": candidate.fits,
        "verdict": candidate.verdict,
        "tpot_s": candidate.cost.tpot_s if candidate.cost else None,
    }
