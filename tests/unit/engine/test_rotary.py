"""Rotary embeddings of packed steps against what ``transformers.generate`` computes for each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
)

from cluster.checkpoint.rope_scaling import rope_by_length
from cluster.domain.errors import UnsupportedModelError
from cluster.domain.model_spec import RopeByLength
from cluster.engine.model import rotary
from cluster.engine.step import SequenceKey, StepEntry

ORIGINAL = 16
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    "rope_theta": 100.0, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip


def _phimoe() -> PhimoeConfig:
    scales = {"short_mscale": 1.1, "long_mscale": 1.3}
    return PhimoeConfig(**TINY, max_position_embeddings=64, rope_parameters=LONG | scales, num_local_experts=2)


def _gemma3() -> Gemma3TextConfig:
    local = {"rope_type": "default", "rope_theta": 50.0}
    return Gemma3TextConfig(
        **TINY, head_dim=8, max_position_embeddings=ORIGINAL, layer_types=["sliding_attention", "full_attention"],
        sliding_window=8, rope_parameters={"full_attention": DYNAMIC, "sliding_attention": local},
    )  # fmt: skip


CONFIGS = {
    "llama dynamic": lambda: LlamaConfig(**TINY, max_position_embeddings=ORIGINAL, rope_parameters=DYNAMIC),
    "llama longrope": lambda: LlamaConfig(**TINY, max_position_embeddings=64, rope_parameters=dict(LONG)),
    "cohere dynamic": lambda: CohereConfig(**TINY, max_position_embeddings=ORIGINAL, rope_parameters=DYNAMIC),
    "falcon dynamic": lambda: FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, eos_token_id=None,
        max_position_embeddings=ORIGINAL, rope_parameters=DYNAMIC,
    ),
    "neox partial dynamic": lambda: GPTNeoXConfig(
        vocab_size=61, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, max_position_embeddings=ORIGINAL, rope_parameters=DYNAMIC | {"partial_rotary_factor": 0.5},
    ),
    "gemma3 by layer type": _gemma3,
    "phi3 longrope": lambda: Phi3Config(
        **TINY, max_position_embeddings=64, original_max_position_embeddings=ORIGINAL, rope_parameters=dict(LONG)
    ),
    "phimoe longrope": _phimoe,
}  # fmt: skip
SWITCHING = ("phi3 longrope", "phimoe longrope")  # whose generate begins anew when it passes the original length


def _built_on_meta(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).base_model


def _rotary_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _alone(make: Any, num_prompt: int, new: int) -> dict[tuple[Any, int, int], tuple[torch.Tensor, ...]]:
    """(layer type, number of tokens known, position) -> cos and sin that a fresh model's generate computed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    seen: dict[tuple[Any, int, int], tuple[torch.Tensor, ...]] = {}
    for module in _rotary_modules(model):
        plain = module.forward

        def forward(x, position_ids, layer_type=None, plain=plain):
            arguments = () if layer_type is None else (layer_type,)
            result = plain(x, position_ids, *arguments)
            known = int(position_ids.max()) + 1
            for index, position in enumerate(position_ids[0].tolist()):
                seen[layer_type, known, position] = tuple(part[0, index].clone() for part in _as_tuple(result))
            return result

        module.forward = forward
    ids = torch.randint(3, 61, (1, num_prompt))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return seen


def _entry(slot: int, start: int, count: int, num_prompt: int) -> StepEntry:
    return StepEntry(SequenceKey(1, slot), slot, (5,) * count, start, 0, (), sample=False, num_prompt=num_prompt)


def _steps(prompts: list[int], total: int, *, switches: bool) -> list[list[StepEntry]]:
    """A schedule that mixes chunks of prompts with decodes of others; every sequence grows to ``total`` tokens.

    One that switches is computed anew, in chunks, once it knows more than the original length; ``num_prompt`` says so.
    """
    at = dict.fromkeys(range(len(prompts)), 0)
    asked = dict(enumerate(prompts))
    steps, chunk = [], 5
    for turn in range(1000):
        if all(at[slot] >= total for slot in at):
            break
        entries = []
        for slot in at:
            known = max(asked[slot], at[slot] + 1)
            if switches and known > ORIGINAL and asked[slot] <= ORIGINAL:
                asked[slot], at[slot] = known, 0
            if at[slot] >= total or (slot + turn) % 3 == 0:
                continue
            count = min(chunk, asked[slot] - at[slot]) if at[slot] < asked[slot] else 1
            entries.append(_entry(slot, at[slot], count, asked[slot]))
            at[slot] += count
        if entries:
            steps.append(entries)
    return steps


@pytest.mark.parametrize("family", CONFIGS)
def test_each_token_of_a_mixed_batch_gets_what_generate_gives_it_alone(family: str) -> None:
    make, prompts, total = CONFIGS[family], [3, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 23], 27
    alone = [_alone(make, prompt, total + 1 - prompt) for prompt in prompts]
    model = _built_on_meta(make())
    ours = rotary.rebuild(model, CPU)
    assert ours.by_length
    compared = 0
    for entries in _steps(prompts, total, switches=family in SWITCHING):
        ours.begin(entries)
        positions = torch.tensor([[p for entry in entries for p in range(entry.start, entry.end)]])
        for module in _rotary_modules(model):
            for layer_type in getattr(module, "layer_types", [None]):
                arguments = () if layer_type is None else (layer_type,)
                got = _as_tuple(module(torch.zeros(1, 1), positions, *arguments))
                row = 0
                for entry in entries:
                    for position in range(entry.start, entry.end):
                        expected = alone[entry.slot][layer_type, max(entry.num_prompt, position + 1), position]
                        for part, reference in zip(got, expected, strict=True):
                            assert torch.equal(part[0, row], reference), (entry, position, layer_type)
                        row += 1
                        compared += 1
    assert compared >= 100, compared


@pytest.mark.parametrize("family", CONFIGS)
def test_the_scheduler_is_told_the_same_as_the_modules(family: str) -> None:
    config = CONFIGS[family]()
    told = rope_by_length(config.to_dict(), config.max_position_embeddings)
    assert told == RopeByLength("switch" if family in SWITCHING else "dynamic", ORIGINAL)
    ours = rotary.rebuild(_built_on_meta(config), CPU)
    assert {rope.original_len for rope in ours._ropes} == {told.original_len}


def test_lengths_change_what_is_computed() -> None:
    """Guards the test above against tables that are all alike."""
    model = _built_on_meta(CONFIGS["llama dynamic"]())
    ours = rotary.rebuild(model, CPU)
    results = []
    for num_prompt in (1, ORIGINAL + 1, ORIGINAL + 2):
        ours.begin([_entry(0, 3, 1, num_prompt)])
        results.append(model.rotary_emb(torch.zeros(1, 1), torch.tensor([[3]]))[0])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_only_a_family_that_must_runs_once_for_each_length() -> None:
    one_pass = {}
    for family, make in CONFIGS.items():
        ours = rotary.rebuild(_built_on_meta(make()), CPU)
        one_pass[family] = all(rope._one_pass for rope in ours._ropes)
    assert [family for family, fast in one_pass.items() if not fast] == ["phimoe longrope"]


PLAIN = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama linear": lambda: LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 4.0}),
    "llama yarn": lambda: LlamaConfig(
        **TINY, max_position_embeddings=64,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "llama3": lambda: LlamaConfig(
        **TINY, max_position_embeddings=64,
        rope_parameters={
            "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "rope_theta": 10000.0,
        },
    ),
    "gemma": lambda: GemmaConfig(**TINY, head_dim=8),
    "gpt-oss yarn": lambda: GptOssConfig(**TINY, head_dim=8, num_local_experts=2),
    "qwen2": lambda: Qwen2Config(**TINY),
}  # fmt: skip


@pytest.mark.parametrize("family", [*PLAIN, *CONFIGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_built_on_meta_become_those_of_a_real_model(family: str, dtype: torch.dtype) -> None:
    make = (PLAIN | CONFIGS)[family]
    model = _built_on_meta(make(), dtype)
    rotary.rebuild(model, CPU)
    real = AutoModelForCausalLM.from_config(make(), dtype=dtype).base_model
    expected = dict(real.named_buffers())
    got = dict(model.named_buffers())
    assert got.keys() == expected.keys()
    assert any(name.endswith("inv_freq") for name in got)
    for name, buffer in got.items():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.dtype == (torch.float32 if name.endswith("inv_freq") else expected[name].dtype), name
    assert all(parameter.is_meta for parameter in model.parameters())


def test_parameters_that_are_loaded_stay_as_they_are() -> None:
    """Gemma 3 keeps a scale beside the weights of its embedding."""
    model = _built_on_meta(CONFIGS["gemma3 by layer type"]())
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(torch.full((61, 32), 7.0), requires_grad=False)
    weight = embedding.weight
    rotary.rebuild(model, CPU)
    assert embedding.weight is weight
    assert bool((weight == 7.0).all())
    assert float(embedding.embed_scale) == pytest.approx(32**0.5)


def test_a_buffer_that_nobody_computes_is_refused_by_name() -> None:
    model = _built_on_meta(CONFIGS["llama dynamic"]())
    model.layers[1].register_buffer("mystery", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mystery"):
        rotary.rebuild(model, CPU)


def test_buffers_of_the_checkpoint_are_left_to_it() -> None:
    model = _built_on_meta(PLAIN["llama"]())
    model.layers[0].register_buffer("counts", torch.empty(3, device="meta"), persistent=True)
    rotary.rebuild(model, CPU)
    assert model.layers[0].counts.is_meta


def test_a_family_of_ours_fills_its_own_buffers() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.empty(2, device="meta"), persistent=False)

        def fill_buffers(self) -> None:
            self.scale.copy_(torch.tensor([1.5, 2.5]))

    model = nn.Sequential(Scale())
    assert not rotary.rebuild(model, CPU).by_length
    assert model[0].scale.tolist() == [1.5, 2.5]


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_TABLES_KEPT", 4)
    model = _built_on_meta(CONFIGS["llama dynamic"]())
    ours = rotary.rebuild(model, CPU)
    first = None
    for _ in range(2):
        for length in range(ORIGINAL + 1, ORIGINAL + 20):
            ours.begin([_entry(0, length - 1, 1, 1)])
            result = model.rotary_emb(torch.zeros(1, 1), torch.tensor([[length - 1]]))[0]
            if length == ORIGINAL + 1:
                first = result if first is None else first
                assert torch.equal(first, result)
            assert len(ours._ropes[0]._tables) <= 4


def test_token_lengths() -> None:
    entries = [_entry(0, 2, 3, 10), _entry(1, 8, 4, 10), _entry(2, 30, 1, 10)]
    assert rotary.token_lengths(entries).tolist() == [10, 10, 10, 10, 10, 11, 12, 31]
