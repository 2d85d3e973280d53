"""What this machine could do at best: measured memory bandwidth and matrix product rates, and the bound they set.

    T_step >= max((weight_bytes + B * S * kv_bytes) / BW, 2 * P * B / F)

``P`` parameters that a step multiplies with (embedding rows are looked up, not multiplied), ``B`` sequences, ``S``
known tokens of each, ``BW`` bytes and ``F`` operations a second, on one rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """``gemm_flops``: products as large as they like; ``thin_gemm_flops``: by rows, the width that decodes have."""

    bandwidth_bytes_s: float
    gemm_flops: float
    thin_gemm_flops: dict[int, float]

    def best(self, other: Machine) -> Machine:
        """The greater of each: what the machine can do is what it did once."""
        return Machine(
            max(self.bandwidth_bytes_s, other.bandwidth_bytes_s),
            max(self.gemm_flops, other.gemm_flops),
            {rows: max(rate, other.thin_gemm_flops[rows]) for rows, rate in self.thin_gemm_flops.items()},
        )


def measure(threads: int, rows: list[int], hidden: int, ffn: int) -> Machine:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    large = torch.ones(128 * 2**20)
    bandwidth = large.nbytes / _least_s(large.sum)
    del large
    square = torch.randn(2048, 2048)
    out = torch.empty_like(square)
    gemm = 2 * 2048**3 / _least_s(lambda: torch.mm(square, square, out=out))
    thin = {count: _thin(count, hidden, ffn) for count in rows}
    return Machine(bandwidth, gemm, thin)


def _thin(rows: int, hidden: int, ffn: int) -> float:
    """Over more weights than caches hold, packed by oneDNN where this torch can."""
    weights = [torch.randn(ffn, hidden) for _ in range(48)]
    x = torch.randn(rows, hidden)
    packed = _packed(weights, rows)

    def products() -> None:
        for weight in packed:
            if weight.is_mkldnn:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # noqa: SLF001
            else:
                torch.nn.functional.linear(x, weight)

    return 2 * rows * hidden * ffn * len(weights) / _least_s(products)


def _packed(weights: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    try:
        return [torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), rows) for weight in weights]  # noqa: SLF001
    except (RuntimeError, AttributeError):
        return weights


def _least_s(work: Callable[[], object], times: int = 7) -> float:
    found = []
    with torch.inference_mode():
        for _ in range(times):
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
    return min(found)


def bound_tokens_s(machine: Machine, shape: dict, concurrency: int, prompt: int, new: int) -> float:
    """Output tokens a second that no engine can pass here: prompts computed at the best product rate, then decodes."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_width = hidden // heads * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * shape["intermediate_size"]
    layers = shape["num_hidden_layers"]
    parameters = layers * layer + hidden * shape["vocab_size"]
    kv_bytes = 2 * layers * kv_width * FLOAT_BYTES
    prefill_s = 2 * layers * layer * prompt * concurrency / machine.gemm_flops
    known = prompt + new / 2
    memory_s = (parameters * FLOAT_BYTES + concurrency * known * kv_bytes) / machine.bandwidth_bytes_s
    step_s = max(memory_s, 2 * parameters * concurrency / machine.gemm_flops)
    return concurrency * new / (prefill_s + (new - 1) * step_s)
