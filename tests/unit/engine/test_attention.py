"""Paged attention against plain causal attention, for every mix of decodes and chunks."""

import random
from types import SimpleNamespace

import pytest
import torch

from cluster.engine.model import attention
from cluster.engine.model.attention import PagedKVCache, layout_step, paged_attention
from cluster.engine.step import SequenceKey, StepEntry

CPU = torch.device("cpu")
BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 4, 40, 6, 3, 8
SCALE = DIM**-0.5


def plain(query, keys, values, window):
    """[tokens, heads, dim] of one whole sequence, the textbook way."""
    length = query.shape[0]
    keys = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    values = values.repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * SCALE
    q, k = torch.arange(length)[:, None], torch.arange(length)
    visible = k <= q
    if window is not None:
        visible &= k > q - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


class Sequences:
    """Random sequences that are fed to the paged attention chunk by chunk."""

    def __init__(self, lengths, seed):
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            [torch.randn(n, h, DIM, generator=generator) for n in lengths] for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        free = list(range(BLOCKS))
        random.Random(seed).shuffle(free)
        self.blocks = [tuple(free.pop() for _ in range(-(-n // BLOCK))) for n in lengths]
        self.done = [0] * len(lengths)

    def entry(self, i, count):
        start = self.done[i]
        self.done[i] += count
        blocks = self.blocks[i][: -(-self.done[i] // BLOCK)]
        return StepEntry(SequenceKey(0, i), (0,) * count, start, blocks, sample=False)

    def packed(self, tensors, entries):
        rows = [tensors[e.key.sequence_id][e.start : e.end] for e in entries]
        return torch.cat(rows).transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_equals_plain_causal_attention(window, seed, monkeypatch):
    if seed % 2:  # slices of a few rows
        monkeypatch.setattr(attention, "ATTENTION_WORKSPACE_BYTES", HEADS * 4 * 40)
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, 13, 30]) for _ in range(4)]
    sequences = Sequences(lengths, seed)
    cache = PagedKVCache(2, BLOCKS, BLOCK, KV_HEADS, DIM, torch.float32, CPU)
    module = SimpleNamespace(paged_cache=cache, layer_idx=1)
    got = [[] for _ in lengths]
    while any(done < n for done, n in zip(sequences.done, lengths, strict=True)):
        todo = [i for i, n in enumerate(lengths) if sequences.done[i] < n]
        chosen = rng.sample(todo, rng.randint(1, len(todo)))
        entries = tuple(sequences.entry(i, rng.randint(1, lengths[i] - sequences.done[i])) for i in chosen)
        cache.layout = layout_step(entries, BLOCK, CPU, slice_blocks=rng.choice([1, 5, 100]))
        q, k, v = (sequences.packed(t, entries) for t in (sequences.q, sequences.k, sequences.v))
        out, weights = paged_attention(module, q, k, v, None, scaling=SCALE, sliding_window=window)
        assert weights is None
        first = 0
        for entry in entries:
            got[entry.key.sequence_id].append(out[0, first : first + len(entry.token_ids)])
            first += len(entry.token_ids)
    for i in range(len(lengths)):
        expected = plain(sequences.q[i], sequences.k[i], sequences.v[i], window)
        torch.testing.assert_close(torch.cat(got[i]), expected, atol=1e-5, rtol=1e-5)
    assert not cache.keys[0].any(), "another layer's pool was touched"
