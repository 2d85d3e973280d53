"""Where a step's tokens stand and go: every rank's block tables, and the layout of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from cluster.engine.step import StepEntry


class BlockTables:
    """Block ids of every running sequence: row = slot, column = position // block size.

    Plans carry only new blocks; ``apply`` writes them, in plan order. ``host`` (``[max_num_seqs,
    blocks_per_sequence]`` int32, what lies beyond a sequence's blocks is stale) and ``tensor``, the same on
    ``device``, are one memory on a CPU.
    """

    def __init__(self, max_num_seqs: int, blocks_per_sequence: int, device: torch.device) -> None:
        self.host = np.zeros((max_num_seqs, blocks_per_sequence), dtype=np.int32)
        shared = torch.from_numpy(self.host)
        self.tensor = shared if device.type == "cpu" else shared.to(device)
        self._device = device

    def apply(self, entries: Sequence[StepEntry]) -> None:
        """Takes over the new blocks of a plan, before its layout is made."""
        written: list[np.ndarray] = []
        width = self.host.shape[1]
        for entry in entries:
            count = len(entry.new_block_ids)
            if count:
                assert entry.first_block + count <= width, f"slot {entry.slot} has more blocks than its table"
                self.host[entry.slot, entry.first_block : entry.first_block + count] = entry.new_block_ids
                start = entry.slot * width + entry.first_block
                written.append(np.arange(start, start + count))
        if written and self._device.type != "cpu":
            cells = np.concatenate(written)
            values = torch.from_numpy(self.host.reshape(-1)[cells]).to(self._device, non_blocking=True)
            self.tensor.view(-1).index_copy_(0, torch.from_numpy(cells).to(self._device, non_blocking=True), values)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The packed tokens of a step, in the order of its entries. Tensors lie on the model's device, ``int64``.

    ``sequences``: on the host, ``[entries, 4]`` int64, C order: slot, first position, tokens, index of the first
    token in the step. ``sampled``: indices in the step of the tokens after which one is sampled.
    ``num_prompt``: of each token, its sequence's prompt tokens. ``memo``: what a kernel wants to keep for the other
    layers of this step.
    """

    token_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    kv_slots: torch.Tensor  # [tokens] block id * block size + offset
    num_prompt: torch.Tensor  # [tokens]
    sampled: torch.Tensor  # [sampled entries]
    sequences: np.ndarray
    tables: BlockTables
    block_size: int
    memo: dict[object, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def layout_step(entries: Sequence[StepEntry], tables: BlockTables, block_size: int) -> StepLayout:
    """The layout of ``entries``, whose blocks ``tables`` has already."""
    known = np.array(
        [(entry.slot, entry.start, len(entry.token_ids), entry.num_prompt, entry.sample) for entry in entries],
        dtype=np.int64,
    )
    slots, starts, counts = known[:, 0], known[:, 1], known[:, 2]
    ends = counts.cumsum()
    firsts = ends - counts
    total = int(ends[-1])
    token_ids = np.fromiter(chain.from_iterable(entry.token_ids for entry in entries), dtype=np.int64, count=total)
    if total == len(entries):
        rows, positions, num_prompt = slots, starts.copy(), known[:, 3].copy()
    else:
        rows, num_prompt = slots.repeat(counts), known[:, 3].repeat(counts)
        positions = np.arange(total) + (starts - firsts).repeat(counts)
    kv_slots = tables.host[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    device = tables.tensor.device
    return StepLayout(
        token_ids=_on(token_ids, device),
        positions=_on(positions, device),
        kv_slots=_on(kv_slots, device),
        num_prompt=_on(num_prompt, device),
        sampled=_on(ends[known[:, 4] != 0] - 1, device),
        sequences=np.ascontiguousarray(np.stack((slots, starts, counts, firsts), axis=1)),
        tables=tables,
        block_size=block_size,
    )


def _on(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
