"""Run as a script: what transformers and DeepSpeed say of each configuration, as JSON on standard output.

Reads {"name": config, ...} on standard input. The models live on the meta device; AutoTP partitions them for a
real (but silent) process group of eight, exactly as the engine drives it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
warnings.simplefilter("ignore")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed import comm as dist  # noqa: E402
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META  # noqa: E402
from deepspeed.module_inject.auto_tp import AutoTP  # noqa: E402
from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from cluster.domain.parallel_layout import grain_size  # noqa: E402

# Layers are alike: these are built whole, of the others two layers tell everything.
FULL_SIZE = ("llama-3.1-405b", "falcon-40b")
COLUMN, ROW = PartitionType.COLUMN, PartitionType.ROW


def layer_specs(config: Any) -> list[TPLayerSpec]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    qkv = ((heads * head_dim, kv * head_dim, kv * head_dim), -1)
    return [
        TPLayerSpec(
            [r".*\.(o_proj|out_proj|down_proj|dense_4h_to_h)\.weight$", r".*self_attention\.dense\.weight$"], ROW
        ),
        TPLayerSpec([r".*\.qkv_proj\.weight$"], COLUMN, shape=qkv, partition_dim=0),
        TPLayerSpec([r".*\.Wqkv\.weight$"], COLUMN, shape=(3, -1), partition_dim=0),
        TPLayerSpec([r".*\.gate_up_proj\.weight$"], COLUMN, shape=(2, -1), partition_dim=0),
        TPLayerSpec([r".*\.([qkv]_proj|gate_proj|up_proj|query_key_value|dense_h_to_4h)\.weight$"], COLUMN),
        TPLayerSpec([r"^lm_head\.weight$"], COLUMN),
    ]


def build(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def parameters(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters()}


def total_parameters(config: Any) -> int:
    return sum(math.prod(shape) for shape in parameters(build(config)).values())


def shards(model: nn.Module, config: Any, tp: int, group: Any, ffn: int) -> dict[str, list[list[int]]]:
    """Parameter -> its shape on each of ``tp`` ranks, from the metadata AutoTP leaves on the parameter."""
    full = parameters(model)
    tied = bool(config.tie_word_embeddings)
    specs = layer_specs(config)[: 5 if tied else 6]
    auto = AutoTP(
        module=model, all_reduce_linears=(), prefix="", state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding), orig_layer_impl=None, keep_module_on_host=True,
        partition_config=AutoTPConfig(tp_size=tp, layer_specs=specs), model_config=config,
        tp_grain_size=grain_size(ffn, tp),
    )  # fmt: skip
    auto.set_tensor_parallel_config(tp, group)
    auto.update_linear_policies()
    auto._replace_module(model)
    found = {}
    for name, parameter in model.named_parameters():
        meta = getattr(parameter, DS_AUTOTP_UC_META, None)
        if not meta or meta["replicated"] or tp == 1:
            found[name] = [full[name]] * tp
            continue
        dim, parts = meta["partition_dim"], meta["sub_param_shard_widths"] or [meta["partition_sizes"]]
        widths = [sum(part[rank] for part in parts) for rank in range(tp)]
        found[name] = [[*full[name][:dim], width, *full[name][dim + 1 :]] for width in widths]
        assert list(parameter.shape) == found[name][0], (name, parameter.shape, found[name])
    return found


def main() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    groups = {tp: dist.new_group(list(range(tp))) for tp in (1, 2, 4, 8)}
    answer: dict[str, Any] = {}
    for name, raw in json.load(sys.stdin).items():
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "architectures"})
        layers = "n_layers" if hasattr(config, "n_layers") else "num_hidden_layers"
        ffn = raw.get("ffn_size_for_grain") or getattr(config, "intermediate_size", None)
        ffn = ffn or getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size
        total = total_parameters(config) if name in FULL_SIZE else None
        setattr(config, layers, 2)
        answer[name] = {
            "total": total,
            "parameters": parameters(build(config)),
            "shards": {tp: shards(build(config), config, tp, group, ffn) for tp, group in groups.items()},
        }
    sys.__stdout__.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
