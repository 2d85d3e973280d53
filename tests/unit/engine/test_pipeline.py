"""Pipeline stages of a model on meta: what each holds, and what cannot be divided. Tokens are compared elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cluster.domain.errors import UnsupportedModelError
from cluster.domain.parallel_layout import Stage, StageLayers
from cluster.engine.model import attention, families, pipeline
from cluster.engine.model.sharding import layer_list
from cluster.engine.model.wide_norm import WideRMSNorm, wide_norm

pytestmark = pytest.mark.integration  # imports transformers

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": 50, "n_positions": 16}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 50,
    "intermediate_size": 64,
}  # fmt: skip


def build(config: dict[str, Any]) -> Any:
    attention.register()
    return families.build(families.load_config(config), torch.float32)


@pytest.mark.parametrize(
    ("index", "holds", "lacks"),
    [
        (0, {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"}, "transformer.ln_f"),
        (1, {"transformer.h.1.ln_1.weight", "transformer.h.2.mlp.c_fc.weight"}, "transformer.w"),
        (2, {"transformer.h.3.ln_1.weight", "transformer.ln_f.weight"}, "transformer.w"),
    ],
)
def test_a_stage_holds_its_layers_and_its_end(index: int, holds: set[str], lacks: str) -> None:
    model = build(GPT2)
    path = layer_list(model)
    layers = (StageLayers(0, 1), StageLayers(1, 3), StageLayers(3, 4))[index]
    found = pipeline.trace(model, path)
    assert found.entry.keys() == {"transformer.wte", "transformer.wpe"}
    assert found.exit.keys() == {"transformer.ln_f"}
    pipeline.keep_stage(model, path, Stage(index, 3, layers), found, pipeline.Received())
    names = {name for name, _ in model.named_parameters()}
    assert holds <= names
    assert not any(name.startswith(lacks) for name in names)
    held = {int(name.split(".")[2]) for name in names if name.startswith("transformer.h.")}
    assert held == set(range(layers.start, layers.stop))
    assert len(model.get_submodule(path)) == 4, "configs describe layers by their place in the list"


def test_layers_that_share_more_than_hidden_states_are_refused() -> None:
    model = build(LLAMA)

    def depend_on_parameters(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"position_embeddings": tuple(t + 1 for t in kwargs["position_embeddings"])}

    model.model.layers[2].register_forward_pre_hook(depend_on_parameters, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="given more than hidden states \\(position_embeddings\\)"):
        pipeline.trace(model, layer_list(model))


def test_blanks_have_the_width() -> None:
    blank = pipeline.Blank(7, torch.bfloat16)
    for given in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 5)):
        out = blank(given)
        assert out.shape == (1, 3, 7)
        assert out.dtype is torch.bfloat16


def test_a_stage_is_entered_and_left_through_hidden_states() -> None:
    received, layer = pipeline.Received(torch.ones(1, 2, 3)), nn.Linear(3, 3)
    layer.attention_type = "full"  # type: ignore[assignment]
    inlet = pipeline.Inlet(layer, received, as_tuple=True)
    assert inlet.attention_type == "full"
    assert inlet(torch.zeros(1, 2, 3), anything=1)[0] is received.hidden
    with pytest.raises(pipeline.StageEnd) as end:
        pipeline.Outlet(layer)(hidden_states=received.hidden)
    assert end.value.hidden is received.hidden


def test_a_norm_over_all_heads_is_that_of_the_whole() -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    whole, given = Olmo2RMSNorm(24, eps=1e-3), torch.randn(5, 24)
    nn.init.normal_(whole.weight)
    totals: list[torch.Tensor] = []
    # Three ranks; the first eight columns are on the first two, so that each counts half of them.
    parts = [(slice(0, 8), 0.5), (slice(0, 8), 0.5), (slice(8, 24), 1.0)]
    for step in ("add up", "use"):
        for columns, share in parts:

            def sum_over_ranks(own: torch.Tensor) -> torch.Tensor:
                totals.append(own)
                return sum(totals[:3], torch.zeros(()))

            norm = WideRMSNorm(nn.Parameter(whole.weight[columns]), 1e-3, 24, share, sum_over_ranks)
            out = norm(given[:, columns])
            if step == "use":
                torch.testing.assert_close(out, whole(given)[:, columns])


def test_a_norm_that_is_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not understood"):
        wide_norm(nn.LayerNorm(24), "self_attn.q_norm", 24, 1.0, lambda total: total)
