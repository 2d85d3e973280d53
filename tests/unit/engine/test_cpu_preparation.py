"""Models made fast for the CPU give what they gave before, and what is not known stays as it is."""

import ctypes
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.engine import host_memory
from cluster.engine.model import agreement, cpu, kernels, products
from tests.unit.engine import cpu_models
from tests.unit.engine.cpu_models import ALONE, CPU, SMALL, hidden

NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
MODELS = {
    "LlamaConfig": SMALL,
    "Qwen2Config": SMALL,
    "Qwen3Config": SMALL | {"head_dim": 16},
    "Gemma2Config": SMALL | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "Phi3Config": SMALL,
    "GPTNeoXConfig": NEOX | {"rotary_pct": 0.25},
    "CohereConfig": SMALL,
    "GptOssConfig": SMALL | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="the CPU kernels are not compiled here")


def build(name, dtype=torch.float32):
    return cpu_models.build(name, MODELS[name], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_gives_the_same(name):
    model, cache = build(name)
    before = hidden(model, cache)
    done = cpu.prepare(model, ALONE)
    assert done.products > 0, done
    torch.testing.assert_close(hidden(model, cache), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "Phi3Config"])
def test_bfloat16(name):
    model, cache = build(name, torch.bfloat16)
    before = hidden(model, cache).float()
    done = cpu.prepare(model, ALONE)
    assert done.products > 0, done
    difference = (hidden(model, cache).float() - before).abs()
    assert difference.mean() < 0.02 * before.abs().mean()


@needs_kernels
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-6), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)])
def test_right_results_are_nearer_than_the_tolerance(monkeypatch, dtype, most):
    """So no module is lost to bad luck: nothing that agrees is further than half of what is allowed from it."""
    seen, agree = [], agreement.agree

    def measured(mine, original):
        if not agree(mine, original):
            return False
        if original.dtype != dtype:  # rotary embeddings are tried in all types
            return True
        seen.append(float((mine.float() - original.float()).abs().max() / original.float().abs().max()))
        return True

    monkeypatch.setattr(agreement, "agree", measured)
    wide = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "head_dim": 64}
    for name in ("LlamaConfig", "Qwen3Config", "Gemma2Config", "Phi3Config"):
        for fields in (MODELS[name], MODELS[name] | wide):
            done = cpu.prepare(cpu_models.build(name, fields, dtype)[0], ALONE)
            assert (done.mlps, done.rotary) == (2, 1), name
    assert len(seen) > 100
    assert max(seen) <= most < agreement.TOLERANCE[dtype] / 2


@needs_kernels
def test_what_is_replaced_in_the_usual_families():
    counts = {}
    for name in ("LlamaConfig", "Qwen3Config", "Gemma2Config", "Phi3Config"):
        done = cpu.prepare(build(name)[0], ALONE)
        counts[name] = (done.merged, done.mlps, done.products, done.norms, done.rotary)
    assert counts == {
        "LlamaConfig": (2, 2, 4, 5, 1),
        "Qwen3Config": (2, 2, 4, 9, 1),
        "Gemma2Config": (2, 2, 4, 9, 1),
        "Phi3Config": (0, 2, 6, 5, 1),
    }


def test_another_rotary_embedding_under_the_same_name_is_kept():
    """Cohere rotates neighbours instead of halves."""
    model, _ = build("CohereConfig")
    assert cpu.prepare(model, ALONE).rotary == 0
    assert not isinstance(sys.modules[type(model).__module__].apply_rotary_pos_emb, cpu._Rotary)


@needs_kernels
def test_the_replaced_rotary_function_is_what_it_was_for_everyone_else():
    cpu.prepare(build("LlamaConfig")[0], ALONE)
    mine = sys.modules["transformers.models.llama.modeling_llama"].apply_rotary_pos_emb
    q, k = torch.randn(2, 4, 6, 16, requires_grad=True), torch.randn(2, 2, 6, 16)
    cos, sin = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    assert all(torch.equal(a, b) for a, b in zip(mine(q, k, cos, sin), mine.original(q, k, cos, sin), strict=True))
    with torch.inference_mode():  # steps of a model on the packed path
        q, cos, sin = torch.randn(1, 6, 4, 16).transpose(1, 2), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
        for a, b in zip(mine(q, q, cos, sin), mine.original(q, q, cos, sin), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


class OtherMLP(nn.Module):
    """Named like Llama's, and does something else."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=True)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OtherRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return x * self.weight / (x.abs().mean(-1, keepdim=True) + self.eps)


@torch.inference_mode()
def test_modules_that_only_look_alike_are_kept():
    model = nn.Sequential(OtherMLP(), OtherRMSNorm())
    x = torch.randn(1, 3, 8)
    before = model(x)
    done = cpu.prepare(model, ALONE)
    assert (done.mlps, done.norms, done.products) == (0, 0, 3)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)


class ClampedMLP(nn.Module):
    """Llama's but for what is large (Step-3.7, DeepSeek-V4, GLM-5)."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down_proj, self.act_fn = nn.Linear(16, 8, bias=False), nn.SiLU()

    def forward(self, x):
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate.clamp(max=10.0) * up.clamp(min=-10.0, max=10.0))


class FarRMSNorm(nn.Module):
    """Like any other but for what is small."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=10 * self.eps))


@torch.inference_mode()
def test_modules_that_differ_for_large_or_small_numbers_only_are_kept():
    model = nn.Sequential(ClampedMLP(), FarRMSNorm())
    inputs = [torch.randn(1, 3, 8) * scale for scale in (1e-4, 1.0, 100.0)]
    before = [model(x) for x in inputs]
    done = cpu.prepare(model, ALONE)
    assert (done.mlps, done.norms, done.products) == (0, 0, 3)
    for x, expected in zip(inputs, before, strict=True):
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_a_processor_without_bfloat16_products_keeps_torchs(monkeypatch):
    """AVX2 alone: torch refuses to reorder such a weight."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, cache = build("LlamaConfig", torch.bfloat16)
    before = hidden(model, cache).float()
    done = cpu.prepare(model, ALONE)
    assert (done.products, done.merged, done.mlps) == (0, 0, 0)
    assert (hidden(model, cache).float() - before).abs().mean() < 0.02 * before.abs().mean()
    assert not isinstance(cpu.head_product(torch.ones(8, 8, dtype=torch.bfloat16)), products.Product)
    assert isinstance(cpu.head_product(torch.ones(8, 8)), products.Product)


@torch.inference_mode()
@pytest.mark.parametrize(("spare", "merged", "weights"), [(64 * 2**20, 3, 3), (0, 0, 2)])
def test_packing_takes_little_more_than_its_room(monkeypatch, spare, merged, weights):
    """Gate and up at once where there is room for both, one after the other where not; 25 MB each."""
    monkeypatch.setattr(cpu, "_SPARE_BYTES", spare)
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is let go of goes back at once, as in a fresh process
    hidden_size, inner = 1024, 6144
    parts = {"gate_proj": (hidden_size, inner), "up_proj": (hidden_size, inner), "down_proj": (inner, hidden_size)}
    models = nn.ModuleList(OtherMLP() for _ in range(3))
    for mlp in models:
        for name, (columns, rows) in parts.items():
            setattr(mlp, name, nn.Linear(columns, rows, bias=False))
        # Llama's own
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    cpu.prepare(nn.Sequential(nn.Linear(64, 64)), ALONE)  # what the first product takes is no matter of packing
    with host_memory.AnonymousPeak() as peak:
        done = cpu.prepare(models, ALONE)
    assert (done.mlps, done.products) == (merged, 9 - 2 * merged)
    assert peak.bytes < weights * 4 * hidden_size * inner + 2**20


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)


@torch.inference_mode()
def test_merged_products_are_right_in_any_order_of_calls():
    module = Attention()
    x, y = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    names = ("q_proj", "k_proj", "v_proj")
    wanted = {(name, t): getattr(module, name)(t) for name in names for t in (x, y)}
    assert cpu.prepare(module, ALONE).merged == 1
    for order in ("qkv", "kqv", "qqkv", "vkq", "qk"):
        for t in (x, y):
            for letter in order:
                name = f"{letter}_proj"
                torch.testing.assert_close(getattr(module, name)(t), wanted[name, t], atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_original_weights_are_let_go():
    model, _ = build("LlamaConfig")
    gone = [weakref.ref(p) for name, p in model.named_parameters() if "_proj" in name]
    assert len(gone) == 14
    cpu.prepare(model, ALONE)
    gc.collect()
    assert all(ref() is None for ref in gone)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(rows, dtype):
    weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
    x = torch.randn(rows, 40).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    expected = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(products.Product(weight, bias)(x), expected, atol=tolerance, rtol=tolerance)
    doubled = products.Product(weight, bias, reduce=lambda t: t.mul_(2))  # as two ranks with the same part would
    torch.testing.assert_close(doubled(x), expected * 2 - bias, atol=2 * tolerance, rtol=tolerance)
    torch.testing.assert_close(
        cpu.head_product(weight)(x), nn.functional.linear(x, weight), atol=tolerance, rtol=tolerance
    )


class ReadingRouter(nn.Module):
    """Multiplies with the weights of its Linears itself, as LongCat's router does."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(40, 24, bias=False)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(40, 8), nn.Linear(40, 4, bias=False), nn.Linear(40, 4)

    def forward(self, x):
        classifier = self.classifier.weight
        both = torch.cat([self.k_proj.weight, classifier]).type(torch.float32)
        return nn.functional.linear(x.to(classifier.device, classifier.dtype).float(), both), x @ self.q_proj.weight.t()


@torch.inference_mode()
@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_reads_the_weight_of_a_replaced_linear_finds_its_numbers(monkeypatch, kept, dtype):
    monkeypatch.setattr(products, "_KEPT_BYTES", kept)
    module, x = ReadingRouter().to(dtype), torch.randn(1, 3, 40).to(dtype)
    wanted = module(x)
    shapes = {name: child.weight.shape for name, child in module.named_children()}
    done = cpu.prepare(module, ALONE)
    assert (done.merged, done.products) == (1, 1)
    for _ in range(2):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(module(x), wanted, strict=True))
    for name, child in module.named_children():
        assert (child.weight.shape, child.weight.dtype, child.weight.device) == (shapes[name], dtype, CPU)


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize(("columns", "width"), [(64, 64), (100, 84), (192, 1376), (65, 1), (330, 600)])
def test_few_rows_are_multiplied_by_a_kernel_of_ours(columns, width):
    """From oneDNN's own memory, where it is laid out as we read it; columns and inputs that fill no panel.

    19 rows and more are enough to fetch what comes next meanwhile, over panels and parts of one.
    """
    weight, bias = torch.randn(columns, width), torch.randn(columns)
    product = products.Product(weight, bias)
    assert (product._few is not None) == ("avx512f" in Path("/proc/cpuinfo").read_text())
    for rows in (1, 6, 7, 18, 19, 24, 25, 64, 65):
        x = torch.randn(rows, 2 * width)[:, :width]  # rows of another tensor, too
        expected = nn.functional.linear(x.double(), weight.double(), bias.double()).float()
        for given in (x, x.contiguous()):
            assert agreement.agree(product(given), expected)


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("is_wrong", [lambda rows: rows <= 18, lambda rows: rows > 18], ids=["few", "many"])
def test_a_product_that_is_wrong_with_few_rows_or_with_many_is_not_used(is_wrong, monkeypatch):
    weight, multiply, seen = torch.randn(96, 40), kernels.load().packed_product, []
    if products.Product(weight, None)._few is None:
        pytest.skip("our product is not for this processor")

    def packed_product(x, *given):
        seen.append(len(x))
        return multiply(x, *given) * (1.01 if is_wrong(len(x)) else 1.0)

    monkeypatch.setattr(kernels.load(), "packed_product", packed_product, raising=False)
    assert products.Product(weight, None)._few is None
    assert min(seen) <= 18


@needs_kernels
@torch.inference_mode()
def test_a_weight_in_another_order_is_left_to_onednn(monkeypatch):
    monkeypatch.setattr(products, "_PANEL", 32)
    weight, x = torch.randn(96, 40), torch.randn(3, 40)
    product = products.Product(weight, None)
    assert product._few is None
    torch.testing.assert_close(product(x), x @ weight.t(), atol=2e-5, rtol=2e-5)


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 1376])
def test_silu_mul(width):
    both = torch.randn(3, 2 * width) * 30
    gate, up = both.double().chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(gate) * up).float()
    torch.testing.assert_close(kernels.load().silu_mul(both), expected, atol=1e-6, rtol=1e-6)
