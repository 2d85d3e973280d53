"""The compiled CPU kernels beside torch's own operations; attention has its contract in test_attention."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from cluster.engine import cpu_kernels
from cluster.engine.model import kernels, native_attention
from cluster.engine.model.attention import BlockTables, Features, LayerKV, PagedKVCache, layout_step
from cluster.engine.step import SequenceKey, StepEntry

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
ROWS = (1, 3, 90)  # the last ones go to several threads


def built():
    """Every compiled library that this processor can run."""
    paths = [cpu_kernels.folder() / f"{kind}.so" for kind in cpu_kernels._runnable()]
    return {path.stem: path for path in paths if path.is_file()}


@pytest.fixture(params=built() or ["none"])
def library(request, monkeypatch):
    if request.param == "none":
        pytest.skip("the CPU kernels are not compiled here")
    found = kernels.Kernels(built()[request.param])
    monkeypatch.setattr(kernels, "load", lambda: found)
    return found


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbers(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens, dim, dtype):
    one = numbers(1, tokens, dim // 2, dtype=torch.float32, seed=9)
    both = torch.cat((one, one), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [512, 45])
def test_a_sum_and_its_norm(library, dtype, rows, width):
    wide = numbers(1, rows, 2 * width, dtype=dtype)
    x, residual = wide[..., width:], numbers(1, rows, width, dtype=dtype, seed=1) * 100
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data = numbers(width, dtype=dtype, seed=2)
    before = x.clone(), residual.clone()
    total, normal = library.add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normal, library.rms_norm(total, norm.weight, 1e-5))
    torch.testing.assert_close(normal, norm(total).detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    gemma = library.add_rms_norm(x, residual, norm.weight, 1e-5, 1.0, early=False)[1]
    expected = (
        total.float() * (total.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + norm.weight.float())
    )
    torch.testing.assert_close(gemma, expected.to(dtype).detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("dim", [64, 40])
def test_rotating_views_of_a_merged_product(library, dtype, tokens, dim):
    heads, kv_heads = 6, 2
    merged = numbers(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).view(tokens, -1, dim)
    q, k = merged[:, :heads], merged[:, heads : heads + kv_heads]
    cos, sin = angles(tokens, dim, dtype)
    as_transformers = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(*as_transformers, cos, sin)
    for mine, right in zip(library.rotate_pair(q, k, cos, sin), expected, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, right[0].transpose(0, 1), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for mine, right in zip(library.rotate(*as_transformers, cos, sin), expected, strict=True):
        torch.testing.assert_close(mine, right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(4, 2, 64, 64), (6, 2, 40, 20), (12, 1, 16, 32)], ids=["vectors", "odd", "one-kv-head"]
)
@pytest.mark.parametrize("features", [Features(scaling=0.1), Features(scaling=0.2, window=7, softcap=3.0)])
def test_attention_of_a_merged_product_is_rotating_then_attending(library, dtype, shape, features):
    """To the bit, in the pool too: a sequence may go from one to the other."""
    heads, kv_heads, key_dim, value_dim = shape
    caches = [PagedKVCache({0: LayerKV(kv_heads, key_dim, value_dim)}, 20, 16, dtype, CPU) for _ in range(2)]
    one, two = (cache.pools[0] for cache in caches)
    tables = BlockTables(2, 10, CPU)
    merged = native_attention.MergedAttention(heads, one, features)
    widths = (heads * key_dim, kv_heads * key_dim, kv_heads * value_dim)
    steps = [((70, (3, 9, 4, 1, 8)), (1, (7,))), ((1, ()), (1, ())), ((1, ()), (30, (2,)))]
    done = [0, 0]
    for number, step in enumerate(steps):
        entries = []
        for slot, (count, blocks) in enumerate(step):
            first = -(-done[slot] // 16)
            entries.append(
                StepEntry(
                    SequenceKey(0, slot), slot, (0,) * count, done[slot], first, blocks, sample=True, num_prompt=1
                )
            )
            done[slot] += count
        tables.apply(entries)
        layout = layout_step(entries, tables, 16)
        tokens = layout.num_tokens
        qkv = numbers(1, tokens, sum(widths) + 5, dtype=dtype, seed=number)[..., : sum(widths)]
        cos, sin = angles(tokens, key_dim, dtype)
        got = merged(qkv, cos, sin, layout)
        q, k, v = (
            part.view(tokens, n, -1)
            for part, n in zip(qkv[0].split(widths, dim=1), (heads, kv_heads, kv_heads), strict=True)
        )
        rotated = library.rotate_pair(q, k, cos, sin)
        expected = native_attention.attend(*rotated, v, two, layout, features)
        assert torch.equal(got, expected.view(1, tokens, -1))
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)
        for behind, rows in ((0, qkv), (widths[0], qkv[..., widths[0] :].contiguous())):
            one.keys.zero_(), one.values.zero_()
            merged.store(rows, cos, sin, layout)
            for pool, whole in ((one.keys, two.keys), (one.values, two.values)):
                stored = pool.flatten(0, 1)[layout.kv_slots]
                assert torch.equal(stored, whole.flatten(0, 1)[layout.kv_slots]), behind
                assert pool.count_nonzero() == stored.count_nonzero(), "it wrote elsewhere"
        one.keys.copy_(two.keys), one.values.copy_(two.values)
    assert one.values.any()
