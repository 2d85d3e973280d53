"""Lean decoder layers give what the family's own layers give; a layer that is not known keeps its own forward."""

import contextlib
import ctypes

import pytest
import torch
import transformers

from cluster.engine import cpu_kernels
from cluster.engine.model import agreement, attention, cpu, cpu_layers, kernels, products, torch_attention, whole_layer
from cluster.engine.step import SequenceKey, StepEntry
from tests.unit.engine import cpu_models
from tests.unit.engine.cpu_models import ALONE, CPU, SMALL, hidden

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the CPU kernels are not compiled here")
LEAN = {
    "llama": ("LlamaConfig", {}),
    "biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "phi3-window": ("Phi3Config", {"sliding_window": 5}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.3, "attention_multiplier": 0.1}),
    "gemma": ("GemmaConfig", {"hidden_activation": "gelu_pytorch_tanh"}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3-no-rotary": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}
OWN = {
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 5}),  # norms after its parts, too
    "cohere": ("CohereConfig", {}),  # attention and MLP beside each other
    "ministral3": ("Ministral3Config", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
    }}),  # queries scaled by their position
}  # fmt: skip


def build(config, dtype=torch.float32):
    name, own = config
    return cpu_models.build(name, SMALL | {"head_dim": 16} | own, dtype)


@pytest.mark.parametrize("name", LEAN)
def test_lean_layers_give_the_same(name):
    model, cache = build(LEAN[name])
    before = hidden(model, cache)
    assert cpu.prepare(model, ALONE).layers == 2
    torch.testing.assert_close(hidden(model, cache), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", OWN)
def test_layers_of_another_shape_keep_their_forward(name):
    model, cache = build(OWN[name])
    before = hidden(model, cache)
    assert cpu.prepare(model, ALONE).layers == 0
    torch.testing.assert_close(hidden(model, cache), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-window"])
def test_bfloat16(name):
    model, cache = build(LEAN[name], torch.bfloat16)
    before = hidden(model, cache).float()
    assert cpu.prepare(model, ALONE).layers == 2
    assert (hidden(model, cache).float() - before).abs().mean() < 0.02 * before.abs().mean()


WHOLE = dict.fromkeys(("llama", "biases", "mistral-window", "qwen2", "phi3-window"), [True] * 2)
WHOLE["smollm3-no-rotary"] = [True, False]  # its second layer rotates nothing


def wholes(model):
    return [layer.forward.__self__._whole is not None for layer in model.layers]


@pytest.mark.parametrize("name", LEAN)
def test_few_rows_of_plain_layers_are_one_call(name):
    """Bit for bit what the parts give, biases and windows too; what stands between the parts keeps a layer in parts."""
    model, cache = build(LEAN[name])
    cpu.prepare(model, ALONE)
    together = hidden(model, cache)
    packed = model.layers[0].self_attn.o_proj._few is not None
    assert wholes(model) == (WHOLE.get(name, [False] * 2) if packed else [False] * 2)
    for layer in model.layers:
        layer.forward.__self__.as_a_whole(None)
    assert torch.equal(hidden(model, cache), together)
    assert wholes(model) == [False] * 2


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, whole_layer.MOST_ROWS, whole_layer.MOST_ROWS + 1])
def test_any_number_of_rows(rows, monkeypatch):
    model, _ = build(LEAN["llama"])
    cache = attention.PagedKVCache(dict.fromkeys(range(2), attention.LayerKV(2, 16, 16)), 40, 4, torch.float32, CPU)
    attention.install(model, cache)
    cpu.prepare(model, ALONE)
    hidden(model, cache)
    lean, calls = model.layers[0].forward.__self__, []
    whole = lean._whole
    monkeypatch.setattr(lean, "_whole", lambda *given: calls.append(1) or whole(*given))
    x, angles = torch.randn(1, 2 * rows, 64)[:, ::2], tuple(torch.randn(2, 1, rows, 16))
    entry = StepEntry(SequenceKey(0, 0), 0, (0,) * rows, 0, 0, tuple(range(-(-rows // 4))), True, rows)
    tables = attention.BlockTables(1, 40, CPU)
    tables.apply([entry])
    cache.layout = attention.layout_step([entry], tables, 4)
    got = model.layers[0](x, position_embeddings=angles)
    assert len(calls) == (rows <= whole_layer.MOST_ROWS)
    lean._whole = None
    by_parts = model.layers[0](x, position_embeddings=angles)
    assert agreement.agree(got, by_parts)
    assert rows > products.MOST_ROWS or torch.equal(got, by_parts)


@pytest.mark.parametrize("is_wrong", [lambda rows: rows <= 18, lambda rows: rows > 18], ids=["few", "many"])
def test_a_whole_that_differs_with_few_rows_or_with_many_is_not_used(is_wrong, monkeypatch):
    """From 19 rows on its products go another way. The parts were right, so they stay."""
    before = kernels.Kernels(cpu_kernels.best_file())

    def layer(where, x, out, rows, threads):
        before.layer(where, x, out, rows, threads)
        if is_wrong(rows):
            ctypes.memset(out, 0, 4 * SMALL["hidden_size"])  # a row of float32

    model, cache = build(LEAN["llama"])
    expected = hidden(model, cache)
    cpu.prepare(model, ALONE)
    if model.layers[0].self_attn.o_proj._few is None:
        pytest.skip("there is no whole layer on this processor")
    hidden(model, cache)
    assert wholes(model) == [True] * 2
    monkeypatch.setattr(kernels.load(), "layer", layer)
    monkeypatch.setattr(cpu_layers, "_PROVEN_WITH_MORE", set())
    model, cache = build(LEAN["llama"])
    assert cpu.prepare(model, ALONE).layers == 2
    torch.testing.assert_close(hidden(model, cache), expected, atol=2e-5, rtol=2e-5)
    assert wholes(model) == [False] * 2


def test_another_kernel_is_used_as_it_is():
    """The pools and the kernel are the module's at the time of the step, not those of the proof."""
    model, cache = build(LEAN["llama"])
    before = hidden(model, cache)
    cpu.prepare(model, ALONE)
    hidden(model, cache)
    for layer in model.layers:
        bound = layer.self_attn.paged
        layer.self_attn.paged = attention.Bound(bound.cache, bound.pool, torch_attention.attend)
    cache.pools[0].keys.zero_()
    torch.testing.assert_close(hidden(model, cache), before, atol=2e-5, rtol=2e-5)
    assert cache.pools[0].keys.abs().max() > 0


def test_a_hook_keeps_a_layer_as_it_is():
    model, cache = build(LEAN["llama"])
    calls = []
    model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: calls.append(1))
    assert cpu.prepare(model, ALONE).layers == 1
    hidden(model, cache)
    assert len(calls) == 3


@torch.inference_mode()
def test_arguments_that_are_not_a_steps_go_to_the_familys_own_forward(monkeypatch):
    model, cache = build(LEAN["llama"])
    layer = model.layers[0]
    given = []
    own = type(layer).forward
    monkeypatch.setattr(
        type(layer), "forward", lambda self, *args, **kwargs: given.append(kwargs) or own(self, *args, **kwargs)
    )
    cpu.prepare(model, ALONE)
    hidden(model, cache)
    given.clear()
    x, angles = torch.randn(1, 2, 64), tuple(torch.randn(2, 1, 2, 16))
    expected = layer(x, position_embeddings=angles, use_cache=False)
    assert not given
    for unusual in ({"temperature": 2}, {"attention_mask": None, "output_attentions": True}):
        torch.testing.assert_close(layer(x, position_embeddings=angles, **unusual), expected, atol=2e-5, rtol=2e-5)
    assert len(given) == 2
    halves = tuple(angle[..., :8] for angle in angles)
    with pytest.raises(RuntimeError):  # its own complaint
        layer(x, position_embeddings=halves)
    assert len(given) == 3


class TwiceLlama(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """Llama's, but for what its result is scaled by."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (1 + 1e-4)


class OtherValues(transformers.models.llama.modeling_llama.LlamaAttention):
    """Llama's, but for far positions."""

    def forward(self, hidden_states, position_ids=None, **kwargs):
        far = 1 + (position_ids[..., None] >= 5_000) * 1e-3
        return super().forward(hidden_states * far, position_ids=position_ids, **kwargs)


@torch.inference_mode()
def test_layers_that_only_look_alike_are_kept():
    model, _ = build(LEAN["llama"])
    model.layers[0].__class__ = TwiceLlama
    model.layers[1].self_attn.__class__ = OtherValues
    assert cpu.prepare(model, ALONE).layers == 0


@torch.inference_mode()
@pytest.mark.parametrize("answers", [[False], [True, False]])
def test_all_ranks_decide_alike(answers, monkeypatch):
    """One that does not agree keeps the others from theirs, before the proof and after it."""
    model, _ = build(LEAN["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(cpu_layers, "replace", lambda *_: False)
        cpu.prepare(model, ALONE)
    layer, left, votes = model.layers[0], list(answers), []
    paged = layer.self_attn.__dict__.get("paged")

    def ask(vote):
        votes.append(vote)
        return left.pop(0)

    assert not cpu_layers.replace(layer, ask)
    assert votes == [True] * len(answers)
    assert "forward" not in layer.__dict__
    assert layer.self_attn.__dict__.get("paged") is paged
    assert not cpu_layers.replace(model.norm, ask)
    assert len(votes) == len(answers)
    assert cpu_layers.replace(layer, lambda vote: vote)


def test_a_layer_called_by_position_is_called_as_before():
    model, _ = build(LEAN["llama"])
    layer = model.layers[0]
    seen = []
    original = layer.forward
    layer.forward = lambda *given, **named: seen.append((given, named)) or original(*given, **named)
    cpu.prepare(model, ALONE)
    assert layer.forward.__name__ == "forward"
    seen.clear()
    hidden, angles = torch.randn(1, 3, model.config.hidden_size), object()
    with contextlib.suppress(TypeError):
        layer.forward(hidden, None, position_embeddings=angles)
    assert seen == [((hidden, None), {"position_embeddings": angles})]


def test_a_product_takes_no_other_type_or_width():
    product = products.Product(torch.randn(128, 64), None)
    for wrong in (
        torch.randn(2, 64, dtype=torch.bfloat16),
        torch.randn(2, 64, dtype=torch.float64),
        torch.randn(2, 32),
    ):
        with pytest.raises(RuntimeError):
            product(wrong)
