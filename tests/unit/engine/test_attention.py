"""Every attention kernel against plain causal attention: random paging, every mix of decodes and chunks, every feature."""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.engine import cpu_kernels
from cluster.engine.model import attention, kernels, native_attention, torch_attention
from cluster.engine.model.attention import BlockTables, Features, LayerKV, PagedKVCache, layout_step
from cluster.engine.model.attention_features import BlockSparse
from cluster.engine.step import SequenceKey, StepEntry

CPU = torch.device("cpu")
BLOCKS = 80


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int = 4
    lengths: tuple[int, ...] = (1, 2, 5, 13, 30)


SHAPES = {
    "gqa": Shape(6, 3, 8, 8),
    "mha": Shape(4, 4, 16, 16),
    "mqa": Shape(12, 1, 16, 16),
    "value-width": Shape(4, 2, 12, 20),
    "vectors": Shape(4, 2, 64, 32, block_size=16, lengths=(1, 40, 130, 200)),
    "odd": Shape(3, 1, 80, 33, block_size=8, lengths=(3, 70, 150)),
    "wide": Shape(10, 2, 32, 96, block_size=16, lengths=(1, 40, 130, 200)),
}
FEATURES = {
    "plain": {},
    "window-1": {"window": 1},
    "window-5": {"window": 5},
    "window-100": {"window": 100},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": 1.0},
    "alibi": {"alibi_slopes": 0.3},
    "alibi-table": {"alibi_table": 0.5},
    "all": {"window": 7, "softcap": 3.0, "sinks": 1.0, "alibi_slopes": 0.1},
    "sparse": {"block_sparse": {"block": 4, "local_blocks": 2, "stride": 3, "alike": False}},
    "sparse-alike": {"block_sparse": {"block": 3, "local_blocks": 1, "stride": 2, "alike": True}},
    "sparse-steps": {"block_sparse": {"block": 8, "local_blocks": 1, "stride": 13, "alike": False}},
    "sparse-all": {
        "block_sparse": {"block": 2, "local_blocks": 2, "stride": 4, "alike": False},
        "window": 20, "softcap": 3.0, "sinks": 1.0, "alibi_slopes": 0.1,
    },
}  # fmt: skip


def plain(query, keys, values, features):
    """[tokens, heads, dim] of one whole sequence, the textbook way, in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    length, heads, _ = query.shape
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * features.scaling
    offsets = torch.arange(length) - torch.arange(length)[:, None]
    if features.softcap is not None:
        scores = (scores / features.softcap).tanh() * features.softcap
    if features.alibi_slopes is not None:
        scores = scores + features.alibi_slopes.double()[:, None, None] * offsets
    if features.alibi_table is not None:
        scores = scores + features.alibi_table[:, None, :length].double()
    visible = offsets <= 0
    if features.window is not None:
        visible &= offsets > -features.window
    if features.block_sparse is not None:
        sparse = features.block_sparse
        block = torch.arange(length) // sparse.block
        near = block[:, None] - block < sparse.local_blocks
        of_heads = [near | ((block + phase) % sparse.stride == 0) for phase in sparse.phases.tolist()]
        visible = visible & torch.stack(of_heads)
    scores = scores.masked_fill(~visible, -torch.inf)
    if features.sinks is not None:
        sinks = features.sinks.double()[:, None, None].expand(heads, length, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


class Sequences:
    """Random sequences that are fed to the paged attention chunk by chunk, their blocks anywhere."""

    def __init__(self, shape, lengths, seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim), (shape.kv_heads, shape.value_dim))
        self.q, self.k, self.v = (
            [torch.randn(n, h, d, generator=generator).to(dtype) for n in lengths] for h, d in sizes
        )
        free, slots = list(range(BLOCKS)), list(range(len(lengths) + 2))
        rng = random.Random(seed)
        rng.shuffle(free)
        rng.shuffle(slots)
        self.size, self.slots = shape.block_size, slots
        self.blocks = [tuple(free.pop() for _ in range(-(-n // shape.block_size))) for n in lengths]
        self.done, self.known = [0] * len(lengths), [0] * len(lengths)

    def entry(self, i, count):
        start, known = self.done[i], self.known[i]
        self.done[i] += count
        self.known[i] = -(-self.done[i] // self.size)
        new = self.blocks[i][known : self.known[i]]
        return StepEntry(SequenceKey(0, i), self.slots[i], (0,) * count, start, known, new, sample=False, num_prompt=1)

    def packed(self, tensors, entries):
        """As transformers gives it: [1, heads, tokens, dim], a view of [tokens, heads, dim]."""
        rows = [tensors[e.key.sequence_id][e.start : e.end] for e in entries]
        return torch.cat(rows).transpose(0, 1).unsqueeze(0)


def features_of(name, shape, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    found = dict(FEATURES[name])
    for per_head in ("sinks", "alibi_slopes"):
        if per_head in found:
            found[per_head] = torch.rand(shape.heads, generator=generator) * found[per_head]
    if "alibi_table" in found:
        found["alibi_table"] = torch.rand(shape.heads, 240, generator=generator) * found["alibi_table"]
    if "block_sparse" in found:
        found["block_sparse"] = BlockSparse.strided(shape.heads, **found["block_sparse"])
    return Features(scaling=shape.key_dim**-0.5, **found)


@dataclass(frozen=True)
class OnDevice:
    """torch's kernel where its tensors lie elsewhere than in the CPU's memory."""

    device: torch.device

    def __call__(self, *args, **kwargs):
        return torch_attention.attend(*args, **kwargs)


def device_of(kernel):
    return kernel.device if isinstance(kernel, OnDevice) else CPU


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def run(kernel, shape, features, seed, dtype, layer_width=None):
    """What the kernel gives and what it should, sequence by sequence."""
    rng = random.Random(seed)
    lengths = [rng.choice(shape.lengths) for _ in range(4)]
    while sum(-(-n // shape.block_size) for n in lengths) > BLOCKS:
        lengths[lengths.index(max(lengths))] = min(shape.lengths)
    sequences = Sequences(shape, lengths, seed, dtype)
    kv = LayerKV(shape.kv_heads, shape.key_dim, shape.value_dim)
    device = device_of(kernel)
    cache = PagedKVCache({3: LayerKV(1, 4, 4), 5: kv}, BLOCKS, shape.block_size, dtype, device)
    tables = BlockTables(len(lengths) + 2, 60, device)
    bound = attention.Bound(cache, cache.pools[5], kernel)
    module = SimpleNamespace(paged=bound, layer_idx=5)
    for name in ("alibi_slopes", "alibi_table", "block_sparse"):
        if getattr(features, name) is not None:
            setattr(module, name, moved(getattr(features, name), device))
    got = [[] for _ in lengths]
    while any(done < n for done, n in zip(sequences.done, lengths, strict=True)):
        todo = [i for i, n in enumerate(lengths) if sequences.done[i] < n]
        chosen = rng.sample(todo, rng.randint(1, len(todo)))
        entries = [sequences.entry(i, rng.choice([1, rng.randint(1, lengths[i] - sequences.done[i])])) for i in chosen]
        tables.apply(entries)
        cache.layout = layout_step(entries, tables, shape.block_size)
        q, k, v = (sequences.packed(t, entries).to(device) for t in (sequences.q, sequences.k, sequences.v))
        out, weights = attention.paged_attention(
            module, q, k, v, None, scaling=features.scaling, sliding_window=features.window,
            softcap=features.softcap, s_aux=moved(features.sinks, device),
        )  # fmt: skip
        assert weights is None
        assert out.device.type == device.type
        out, first = out.cpu(), 0
        for entry in entries:
            got[entry.key.sequence_id].append(out[0, first : first + len(entry.token_ids)])
            first += len(entry.token_ids)
    assert not cache.pools[3].keys.any(), "another layer's pool was touched"
    expected = [plain(q, k, v, features) for q, k, v in zip(sequences.q, sequences.k, sequences.v, strict=True)]
    return [torch.cat(parts) for parts in got], expected


def built():
    """Every compiled library that this processor can run."""
    paths = [cpu_kernels.folder() / f"{kind}.so" for kind in cpu_kernels._runnable()]
    return {path.stem: path for path in paths if path.is_file()}


@pytest.fixture(params=["torch", "torch on cuda", *(built() or ["none"])])
def kernel(request, monkeypatch):
    if request.param == "torch":
        return torch_attention.attend
    if request.param == "torch on cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        return OnDevice(torch.device("cuda"))
    if request.param == "none":
        pytest.skip("the CPU kernels are not compiled here")
    library = kernels.Kernels(built()[request.param])
    monkeypatch.setattr(kernels, "load", lambda: library)
    return native_attention.attend


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_schedule_equals_plain_causal_attention(kernel, shape, features, monkeypatch):
    for seed in range(3):
        if seed == 1:  # slices of a few rows
            monkeypatch.setattr(torch_attention, "ATTENTION_WORKSPACE_BYTES", SHAPES[shape].heads * 4 * 400)
        wanted = features_of(features, SHAPES[shape], seed)
        got, expected = run(kernel, SHAPES[shape], wanted, seed, torch.float32)
        for mine, right in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), right, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("shape", ["vectors", "wide"])
def test_several_threads(kernel, shape):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for seed in range(3, 6):
            got, expected = run(kernel, SHAPES[shape], features_of("plain", SHAPES[shape], seed), seed, torch.float32)
            for mine, right in zip(got, expected, strict=True):
                torch.testing.assert_close(mine.double(), right, atol=2e-6, rtol=2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", ["gqa", "vectors", "odd", "wide"])
def test_bfloat16(kernel, shape):
    got, expected = run(kernel, SHAPES[shape], features_of("window-100", SHAPES[shape], 0), 0, torch.bfloat16)
    for mine, right in zip(got, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, atol=0.02, rtol=0.02)


def test_large_scores_neither_overflow_nor_vanish(kernel):
    wanted = replace(features_of("plain", SHAPES["vectors"], 0), scaling=40.0)
    got, expected = run(kernel, SHAPES["vectors"], wanted, 0, torch.float32)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("shape", ["gqa", "vectors"])
@pytest.mark.parametrize("bits", [0x7FC00000, -1], ids=["ordinary", "all-ones"])
@pytest.mark.parametrize("damaged", ["query", "key", "value"])
def test_what_is_not_a_number_does_not_vanish(kernel, shape, bits, damaged):
    """The warm-up tells damaged weights by logits that are not finite."""
    shape, device = SHAPES[shape], device_of(kernel)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    kv = LayerKV(shape.kv_heads, shape.key_dim, shape.value_dim)
    for count in (1, 70):  # rows that are few, and many
        blocks = tuple(range(-(-count // shape.block_size)))
        entries = [StepEntry(SequenceKey(0, 0), 0, (0,) * count, 0, 0, blocks, sample=True, num_prompt=count)]
        tables = BlockTables(1, len(blocks), device)
        tables.apply(entries)
        rows = {
            "query": torch.ones(count, shape.heads, shape.key_dim),
            "key": torch.ones(count, shape.kv_heads, shape.key_dim),
            "value": torch.ones(count, shape.kv_heads, shape.value_dim),
        }
        rows[damaged][..., 3] = nan
        pool = PagedKVCache({0: kv}, len(blocks), shape.block_size, torch.float32, device).pools[0]
        layout = layout_step(entries, tables, shape.block_size)
        q, k, v = (rows[name].to(device) for name in ("query", "key", "value"))
        got = kernel(q, k, v, pool, layout, Features(scaling=0.1))
        assert got.isnan().any(-1).all()


@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize("left", [torch.nan, torch.inf])
def test_what_a_sequence_leaves_in_its_blocks_does_not_reach_the_next_one(kernel, features, left):
    """Float16 overflows; that must stay the trouble of the one whose numbers do."""
    shape, device = SHAPES["gqa"], device_of(kernel)
    wanted = features_of(features, shape, 0)
    wanted = replace(wanted, sinks=moved(wanted.sinks, device), alibi_slopes=moved(wanted.alibi_slopes, device))
    q, k, v = (torch.randn(7, heads, 8, device=device) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    cache = PagedKVCache({0: LayerKV(shape.kv_heads, 8, 8)}, 6, 4, torch.float32, device)
    tables = BlockTables(2, 4, device)
    for stored in (cache.pools[0].keys, cache.pools[0].values):
        stored.fill_(left)

    def step(*entries):
        tables.apply(entries)
        rows = [torch.cat([t[e.start : e.end] for e in entries]) for t in (q, k, v)]
        return kernel(*rows, cache.pools[0], layout_step(entries, tables, 4), wanted)

    step(entry(0, (0,) * 5, 0, 0, (5, 2)), entry(1, (0,), 0, 0, (3,)))
    got = step(entry(0, (0,), 5, 2, ()), entry(1, (0,), 1, 1, ()))  # the shorter one is padded
    expected = [plain(q[:n], k[:n], v[:n], wanted)[-1] for n in (6, 2)]
    torch.testing.assert_close(got.double(), torch.stack(expected), atol=2e-6, rtol=2e-6)


def test_phases_of_heads_are_those_that_were_published():
    """(k + head * step + 1) % stride, with steps that spread few heads over a wide stride."""
    assert BlockSparse.strided(4, block=64, local_blocks=16, stride=8, alike=False).phases.tolist() == [1, 3, 5, 7]
    assert BlockSparse.strided(4, block=64, local_blocks=16, stride=3, alike=False).phases.tolist() == [1, 2, 3, 4]
    assert BlockSparse.strided(4, block=64, local_blocks=16, stride=8, alike=True).phases.tolist() == [1, 1, 1, 1]
    phi = BlockSparse.strided(32, block=64, local_blocks=16, stride=8, alike=False)
    seen = phi.visible(torch.tensor([20 * 64 + 5]), 21 * 64)[0].view(32, 21, 64)
    assert [block for block in range(21) if seen[9, block].all()] == [*range(5, 21)]
    assert [block for block in range(21) if seen[6, block].all()] == [1, *range(5, 21)]
    assert torch.equal(phi.of_heads(range(6, 10)).phases, phi.phases[6:10])


def test_queries_may_have_any_stride(kernel):
    """Views of a merged product, as the CPU preparation makes them."""
    shape = SHAPES["vectors"]
    kv = LayerKV(shape.kv_heads, shape.key_dim, shape.value_dim)
    entries = [StepEntry(SequenceKey(0, 0), 0, (0,) * 9, 0, 0, (7,), sample=True, num_prompt=9)]
    tables = BlockTables(1, 4, CPU)
    tables.apply(entries)
    layout = layout_step(entries, tables, shape.block_size)
    merged = torch.randn(9, 4 * 64 + 2 * 64 + 2 * 32, generator=torch.Generator().manual_seed(0))
    q, k, v = merged.split((256, 128, 64), dim=1)
    q, k, v = q.view(9, 4, 64), k.view(9, 2, 64), v.view(9, 2, 32)
    features = Features(scaling=0.1)
    pool = PagedKVCache({0: kv}, 8, shape.block_size, torch.float32, CPU).pools[0]
    got = kernel(q, k, v, pool, layout, features)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), plain(q, k, v, features), atol=2e-6, rtol=2e-6)


def entry(slot, tokens, start, first_block, blocks, sample=True, num_prompt=3):
    return StepEntry(SequenceKey(0, slot), slot, tuple(tokens), start, first_block, tuple(blocks), sample, num_prompt)


def test_layout_of_a_mixed_step():
    tables = BlockTables(4, 3, CPU)
    tables.apply([entry(2, (), 0, 0, (9, 4)), entry(0, (), 0, 0, (1,)), entry(3, (), 0, 0, (5, 6, 7))])
    entries = [
        entry(2, (11,), 5, 1, (8,), num_prompt=4),
        entry(3, (21, 22, 23), 3, 3, (), sample=False, num_prompt=10),
        entry(0, (31,), 0, 0, (2,)),
    ]
    tables.apply(entries)
    layout = layout_step(entries, tables, 4)
    assert layout.token_ids.tolist() == [11, 21, 22, 23, 31]
    assert layout.positions.tolist() == [5, 3, 4, 5, 0]
    assert layout.kv_slots.tolist() == [8 * 4 + 1, 5 * 4 + 3, 6 * 4, 6 * 4 + 1, 2 * 4]
    assert layout.sampled.tolist() == [0, 4]
    assert layout.sequences.tolist() == [[2, 5, 1, 0], [3, 3, 3, 1], [0, 0, 1, 4]]
    assert layout.sampling.tolist() == [0, 2]
    assert tables.tensor[2, :2].tolist() == [9, 8]
    decodes = layout_step(entries[:1], tables, 4)
    assert (decodes.positions.tolist(), decodes.kv_slots.tolist(), decodes.sampled.tolist()) == ([5], [33], [0])


def test_the_layout_of_only_what_is_sampled():
    """What one would get for steps of a token, where the rest of each chunk was known before."""
    tables = BlockTables(4, 3, CPU)
    entries = [
        entry(2, (11, 12, 13), 2, 0, (9, 8)), entry(3, (21, 22, 23), 3, 0, (5, 6, 7), sample=False),
        entry(0, (31,), 6, 0, (2, 3)), entry(1, (41, 42), 0, 0, (1,)),
    ]  # fmt: skip
    tables.apply(entries)
    layout = layout_step(entries, tables, 4)
    before = layout.sequences.copy()
    ends = [entry(2, (13,), 4, 0, ()), entry(0, (31,), 6, 0, ()), entry(1, (42,), 1, 0, ())]
    got, expected = layout.of_sampled(), layout_step(ends, tables, 4)
    for name in ("token_ids", "positions", "kv_slots", "sampled", "sampling", "sequences"):
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
    assert got.sequences.flags.c_contiguous
    assert np.array_equal(layout.sequences, before)


def test_a_table_that_begins_anew_leaves_nothing_of_the_old_sequence_in_use():
    tables = BlockTables(1, 4, CPU)
    tables.apply([entry(0, (), 0, 0, (1, 2, 3, 4))])
    tables.apply([entry(0, (), 0, 0, (9,)), entry(0, (), 0, 1, (8,))])
    assert np.array_equal(tables.host[0, :2], [9, 8])
    with pytest.raises(AssertionError, match="more blocks"):
        tables.apply([entry(0, (), 0, 3, (5, 6))])


def test_the_torch_kernel_keeps_to_its_workspace(monkeypatch):
    """Slices hold as many sequences as fit, and one sequence at least."""
    tables = BlockTables(8, 10, CPU)
    entries = [entry(slot, (0,), 4 * slot, 0, range(slot + 1)) for slot in range(8)]
    tables.apply(entries)
    layout = layout_step(entries, tables, 4)
    slices = list(torch_attention._slices(layout, 40))
    assert all(part.blocks.numel() * 4 <= 40 or len(part.lengths) == 1 for part in slices)
    assert any(len(part.lengths) > 1 for part in slices)
    assert sorted(torch.cat([part.tokens for part in slices]).tolist()) == list(range(8))
