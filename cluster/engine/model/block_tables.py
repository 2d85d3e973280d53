"""Where a step's tokens stand and go: every rank's block tables, and the layout of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    token in the step. ``sampling``: indices of the entries after which a token is sampled, on the host; ``sampled``:
    of the tokens of the step after which they are, each the last of its entry. ``memo``: what a kernel wants to keep
    for the other layers of this step.
    """

    token_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    kv_slots: torch.Tensor  # [tokens] block id * block size + offset
    sampled: torch.Tensor  # [sampled entries]
    sampling: np.ndarray  # [sampled entries]
    sequences: np.ndarray
    tables: BlockTables
    block_size: int
    memo: dict[object, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def of_sampled(self) -> StepLayout:
        """The step of only the tokens after which one is sampled; what comes before them in their sequences is kept."""
        sequences = self.sequences[self.sampling]
        sequences[:, 1] += sequences[:, 2] - 1
        sequences[:, 2] = 1
        sequences[:, 3] = every = np.arange(len(sequences))
        rows = self.sampled
        return StepLayout(
            token_ids=self.token_ids.index_select(0, rows),
            positions=self.positions.index_select(0, rows),
            kv_slots=self.kv_slots.index_select(0, rows),
            sampled=_on(every, rows.device),
            sampling=every,
            sequences=sequences,
            tables=self.tables,
            block_size=self.block_size,
        )


def layout_step(entries: Sequence[StepEntry], tables: BlockTables, block_size: int) -> StepLayout:
    """The layout of ``entries``, whose blocks ``tables`` has already."""
    # Few calls of numpy: each takes as long as several entries do here, and a decode's step is short.
    rows: list[tuple[int, int, int, int]] = []
    token_ids: list[int] = []
    sampling: list[int] = []
    total = 0
    for index, entry in enumerate(entries):
        count = len(entry.token_ids)
        rows.append((entry.slot, entry.start, count, total))
        token_ids += entry.token_ids
        total += count
        if entry.sample:
            sampling.append(index)
    sequences = np.array(rows, dtype=np.int64)
    slots, starts, counts, firsts = sequences.T
    if total == len(rows):
        positions = starts.copy()
    else:
        slots = slots.repeat(counts)
        positions = np.arange(total) + (starts - firsts).repeat(counts)
    columns, offsets = np.divmod(positions, block_size)
    kv_slots = tables.host[slots, columns].astype(np.int64)
    kv_slots *= block_size
    kv_slots += offsets
    known = np.array(sampling, dtype=np.int64)
    device = tables.tensor.device
    return StepLayout(
        token_ids=_on(np.array(token_ids, dtype=np.int64), device),
        positions=_on(positions, device),
        kv_slots=_on(kv_slots, device),
        sampled=_on((firsts + counts - 1)[known], device),
        sampling=known,
        sequences=sequences,
        tables=tables,
        block_size=block_size,
    )


def _on(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
