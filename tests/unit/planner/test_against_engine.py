"""The ledger is exact: what the engine builds, rank by rank, has the bytes that the planner counts.

Every published model is built on the meta device at its full width. Equal decoder layers are built a few times only,
just as many as the layout has stages and one more, since the planner's list of tensors is the model's own, layer for
layer (``test_against_deepspeed``); the largest model is built whole besides.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout
from cluster.planner.memory import kv_bytes_per_token
from cluster.planner.weights import split_stages, stage_parameters

pytestmark = pytest.mark.integration

_HERE = Path(__file__).parent
_LAYOUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (2, 2)]
_OF_UNLIKE_LAYERS = [(4, 1), (2, 2)]  # built with all their layers, which takes longer
_WHOLE = [("llama-3.1-405b", 16, 1), ("llama-3.1-405b", 8, 2)]
_LAYERS_KEYS = ("num_hidden_layers", "n_layers")


def _published() -> Any:
    spec = importlib.util.spec_from_file_location("published", _HERE / "published.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module.PUBLISHED


PUBLISHED = _published()


def _few_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    return config | {key: layers for key in _LAYERS_KEYS if key in config}


def _cases() -> dict[str, tuple[dict[str, Any], ParallelLayout]]:
    cases = {}
    for name, published in PUBLISHED.items():
        alike = any(key in published.config for key in _LAYERS_KEYS)
        fewest = min(shape.num_heads for shape in model_spec(published.config).distinct_layer_shapes)
        for tp, pp in _LAYOUTS if alike else _OF_UNLIKE_LAYERS:
            if tp <= fewest:
                cases[f"{name}-tp{tp}-pp{pp}"] = (_few_layers(published.config, pp + 1), ParallelLayout(tp, pp))
    for name, tp, pp in _WHOLE:
        cases[f"{name}-tp{tp}-pp{pp}-whole"] = (PUBLISHED[name].config, ParallelLayout(tp, pp))
    return cases


CASES = _cases()


@functools.cache
def _ledger(case: str) -> dict[tuple[int, int], list[int]]:
    """(stage, tensor rank) -> bytes of weights, KV bytes per token: of every rank."""
    config, layout = CASES[case]
    spec: ModelSpec = model_spec(config)
    ledger = {}
    for stage, layers in enumerate(split_stages(spec, layout)):
        for rank, parameters in enumerate(stage_parameters(spec, layout, stage, layers)):
            kv_bytes = kv_bytes_per_token(spec, layout, Dtype.BFLOAT16, layers, rank)
            ledger[stage, rank] = [parameters * Dtype.BFLOAT16.itemsize, kv_bytes]
    return ledger


def _ranks(case: str) -> list[tuple[int, int]]:
    """(stage, tensor rank): the first and the last of each stage, and one of each kind where ranks are unequal."""
    chosen = {}
    for (stage, rank), numbers in _ledger(case).items():
        chosen.setdefault((stage, *numbers), (stage, rank))
    _, layout = CASES[case]
    last = layout.tensor_parallel_size - 1
    ends = {(stage, rank) for stage in range(layout.pipeline_parallel_size) for rank in (0, last)}
    return sorted({*chosen.values(), *ends})


@functools.cache
def engine_says() -> dict[str, list[list[int]] | None]:
    """One process for all: importing torch and transformers costs more than most builds."""
    asked = []
    for case, (config, layout) in CASES.items():
        stages = split_stages(model_spec(config), layout)
        asked.append(
            {
                "config": config,
                "tp": layout.tensor_parallel_size,
                "stages": [[stage.start, stage.stop] for stage in stages],
                "ranks": _ranks(case),
            }
        )
    environment = os.environ | {"PYTHONPATH": str(_HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(_HERE / "engine_builds.py")],
        input=json.dumps(asked), capture_output=True, text=True, timeout=480, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.rstrip().rpartition("\n")[2]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_built_rank_has_the_bytes_of_its_ledger(case: str) -> None:
    assert engine_says()[case] == [_ledger(case)[rank] for rank in _ranks(case)]
