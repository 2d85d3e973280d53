"""Run as a script: what the engine builds of each configuration, rank by rank, as JSON on standard output.

Reads [{"config": ..., "tp": ..., "stages": [[start, stop], ...], "ranks": [[stage, tensor rank], ...]}, ...] on standard
input and answers with [bytes of weights, KV bytes per token] of each of those ranks. Everything lives on the meta
device; the cut of a rank needs no other rank, so nobody is there to talk to.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
warnings.simplefilter("ignore")

import torch  # noqa: E402

from cluster.checkpoint.config_json import model_spec  # noqa: E402
from cluster.checkpoint.headers import TensorHeader  # noqa: E402
from cluster.checkpoint.layout import Checkpoint  # noqa: E402
from cluster.checkpoint.tensors import expected_tensors  # noqa: E402
from cluster.domain.errors import UnsupportedModelError  # noqa: E402
from cluster.domain.parallel_layout import Stage, StageLayers  # noqa: E402
from cluster.engine.model import families  # noqa: E402
from cluster.engine.model.causal_lm import ShardedCausalLM  # noqa: E402
from cluster.engine.model.tensor_parallel import TensorParallelGroup  # noqa: E402


def checkpoint(config: dict[str, Any]) -> Checkpoint:
    """Headers of a checkpoint that is nowhere."""
    tensors = {
        tensor.name: TensorHeader(
            name=tensor.name, dtype="BF16", shape=tensor.shape, file=Path("x"), offset=0, nbytes=2 * tensor.numel
        )
        for tensor in expected_tensors(model_spec(config))
    }
    return Checkpoint(
        path=Path("x"), config=config, generation_config=None, tensors=tensors, files=(), total_bytes=0,
        tokenizer_files=(), digest="",
    )  # fmt: skip


def built(asked: dict[str, Any]) -> list[list[int]] | None:
    """None: there is no model code for it here."""
    try:
        families.load_config(asked["config"])
    except UnsupportedModelError:
        return None
    found, tp, stages = checkpoint(asked["config"]), asked["tp"], asked["stages"]
    answers = []
    for index, rank in asked["ranks"]:
        stage = Stage(index, len(stages), StageLayers(*stages[index]))
        model = ShardedCausalLM(
            found, torch.bfloat16, torch.device("cpu"), TensorParallelGroup(rank, tp, "gloo"), stage
        )
        answers.append([model.parameter_bytes, model.kv_bytes_per_token])
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer = [built(asked) for asked in json.load(sys.stdin)]
    sys.__stdout__.write("\n" + json.dumps(answer) + "\n")
