"""The planner's shapes and sizes are those of transformers and DeepSpeed, for every published shape."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.splits import HeadCut, HeadOrder, Whole, shard_sizes
from cluster.checkpoint.tensors import expected_tensors, model_cuts, parameter_count
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout, grain_size
from cluster.planner.weights import split_stages, stage_parameters, tensor_shards

_HERE = Path(__file__).parent


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


PUBLISHED = _load("published", _HERE / "published.py").PUBLISHED

# Shapes that are served or planned beside the published ones: biases, explicit head sizes, uneven heads.
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288, "head_dim": 128,
        "vocab_size": 151936,
    },
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "gemma-7b": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "falcon-7b": {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_kv_heads": 71},
    "tiny-uneven": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 100, "vocab_size": 259,
        "attention_bias": True, "mlp_bias": True, "head_dim": 20,
    },
}  # fmt: skip
_BOTH = {name: p.config for name, p in PUBLISHED.items() if p.in_transformers} | _OTHERS


@functools.cache
def deepspeed_says() -> dict[str, Any]:
    """One process for all models: importing DeepSpeed costs more than asking it."""
    environment = os.environ | {"PYTHONPATH": str(_HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(_HERE / "deepspeed_shapes.py")],
        input=json.dumps(_BOTH), capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    return answer


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    spec = model_spec(published.config)
    assert parameter_count(spec) == published.parameters
    assert spec.kv_bytes_per_token(Dtype.BFLOAT16) == published.kv_bytes
    assert spec.max_model_len == published.context


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_hold_every_parameter_of_every_split_tensor_once(name: str, tp: int) -> None:
    spec = model_spec(PUBLISHED[name].config)
    for tensor in expected_tensors(spec):
        counts = [math.prod(shape) for shape in tensor_shards(spec, tensor, tp)]
        if isinstance(model_cuts(spec).by_name[tensor.name], Whole):
            assert counts == [tensor.numel] * tp
        elif tp <= min(shape.num_kv_heads for shape in spec.distinct_layer_shapes):
            assert sum(counts) == tensor.numel
        else:
            assert sum(counts) >= tensor.numel


@pytest.mark.integration
@pytest.mark.parametrize("name", _BOTH)
def test_tensors_are_those_that_transformers_builds(name: str) -> None:
    """Every parameter's name and shape; for two models also the total of all layers."""
    said = deepspeed_says()[name]
    spec = model_spec(_BOTH[name])
    assert said["total"] in (None, parameter_count(spec))
    expected = {t.name: list(t.shape) for t in expected_tensors(spec) if t.layer is None or t.layer < 2}
    assert said["parameters"] == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "tp"),
    # With more ranks than KV heads DeepSpeed leaves ranks idle; there the heads are shared instead.
    [(name, tp) for name in _BOTH for tp in (1, 2, 4, 8) if tp <= model_spec(_BOTH[name]).num_kv_heads],
)
def test_shards_are_those_that_autotp_cuts(name: str, tp: int) -> None:
    """Every parameter's shape on every rank."""
    spec = model_spec(_BOTH[name])
    said = deepspeed_says()[name]["shards"][str(tp)]
    ours = {
        tensor.name: [list(shape) for shape in tensor_shards(spec, tensor, tp)]
        for tensor in expected_tensors(spec)
        if tensor.layer is None or tensor.layer < 2
    }
    assert ours == said
    outside = {n: s for n, s in said.items() if n in {t.name for t in expected_tensors(spec) if t.layer is None}}
    layers = {n: s for n, s in said.items() if n not in outside}
    for rank, held in enumerate(stage_parameters(spec, layout := ParallelLayout(tp), 0, split_stages(spec, layout)[0])):
        layer = sum(math.prod(shapes[rank]) for shapes in layers.values()) // 2
        assert held == sum(math.prod(s[rank]) for s in outside.values()) + spec.num_layers * layer


@functools.cache
def _tp_shard() -> Any:
    """DeepSpeed's own file, loaded without the rest of DeepSpeed (its size functions need nothing of it)."""
    found = importlib.util.find_spec("deepspeed")
    assert found
    assert found.origin
    stub = ModuleType("deepspeed")
    stub.comm = ModuleType("deepspeed.comm")  # type: ignore[attr-defined]
    before = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = stub
    try:
        return _load("deepspeed_tp_shard", Path(found.origin).parent / "module_inject" / "tp_shard.py")
    finally:
        if before is None:
            del sys.modules["deepspeed"]
        else:
            sys.modules["deepspeed"] = before


@given(total=st.integers(1, 200_000), tp=st.integers(1, 17))
def test_sizes_equal_deepspeeds_and_sum_to_the_total(total: int, tp: int) -> None:
    theirs = _tp_shard()
    meta = theirs.AutoTPMeta(num_kv_heads=None, tp_grain_size=grain_size(total, tp))
    ours = shard_sizes(total, tp)
    assert list(ours) == theirs.get_shard_size_list(total, tp, meta, "model.layers.0.mlp.gate_proj")
    assert sum(ours) == total


@given(kv_heads=st.integers(1, 64), group=st.integers(1, 30), head_dim=st.integers(1, 128), data=st.data())
def test_heads_are_deepspeeds_where_every_rank_can_have_one(
    kv_heads: int, group: int, head_dim: int, data: st.DataObject
) -> None:
    tp = data.draw(st.integers(1, kv_heads))
    theirs = _tp_shard()
    meta = theirs.AutoTPMeta(num_kv_heads=kv_heads, tp_grain_size=64)
    for order, heads, name in ((HeadOrder.QUERY, kv_heads * group, "q_proj"), (HeadOrder.KV, kv_heads, "k_proj")):
        cut = HeadCut(0, kv_heads * group, kv_heads, order, head_dim)
        ours = [sum(b - a for a, b in pieces) for pieces in cut.pieces(tp)]
        assert ours == theirs.get_shard_size_list(heads * head_dim, tp, meta, f"model.layers.3.self_attn.{name}")
