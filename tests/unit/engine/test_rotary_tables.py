"""A table of cosines and sines gives what the family's own rotary module gives, to the bit, or is not used."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cluster.engine.model import rotary_tables
from cluster.engine.model.rotary_tables import POSITIONS

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def rotary(kind="default", cls=LlamaRotaryEmbedding):
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=ROPES[kind]
    )
    return cls(config)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ROPES)
def test_the_same_bits_near_and_far(kind, dtype):
    own, mine, x = rotary(kind), rotary(kind), torch.zeros(1, 1, 1, dtype=dtype)
    assert rotary_tables.replace(mine, dtype)
    for last in (1, 9, POSITIONS, POSITIONS + 1, 2 * POSITIONS):  # the latter are not in the table
        positions = torch.randint(last, (1, 40))
        positions[0, 20] = last - 1
        for got, expected in zip(mine(x, positions), own(x, positions), strict=True):
            assert torch.equal(got, expected)
            assert got.is_contiguous()


def test_what_the_table_does_not_have_is_computed(monkeypatch):
    """Another type, and positions of other shapes."""
    module, own = rotary(), rotary()
    assert rotary_tables.replace(module, torch.float32)
    asked = []
    original = module.forward._original
    monkeypatch.setattr(module.forward, "_original", lambda *given: asked.append(1) or original(*given))
    x, positions = torch.zeros(1, 1, 1), torch.arange(5)[None]
    module(x, position_ids=positions)
    assert not asked
    for given, where in ((x.bfloat16(), positions), (x, positions.expand(2, 5)), (x, positions + POSITIONS)):
        for got, expected in zip(module(given, where), own(given, where), strict=True):
            assert torch.equal(got, expected)
    assert len(asked) == 3


class ByLength(LlamaRotaryEmbedding):
    """Looks at the largest position of the step."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos * position_ids.max(), sin


class ByLayer(LlamaRotaryEmbedding):
    """Is told more."""

    def forward(self, x, position_ids, layer_type=None):
        return super().forward(x, position_ids)


class Heads(LlamaRotaryEmbedding):
    """Gives a row for each head."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos[:, None], sin[:, None]


@pytest.mark.parametrize("cls", [ByLength, ByLayer, Heads])
def test_others_keep_their_forward(cls):
    module = rotary(cls=cls)
    assert not rotary_tables.replace(module, torch.float32)
    assert "forward" not in vars(module)


def test_neither_a_forward_of_ours_nor_another_module_is_replaced():
    module = rotary()
    module.forward = lambda x, position_ids: (x, position_ids)  # as lengths have them (rotary.py)
    assert not rotary_tables.replace(module, torch.float32)
    assert not rotary_tables.replace(torch.nn.Linear(2, 2), torch.float32)
    assert not rotary_tables.replace(rotary(), torch.float16)
