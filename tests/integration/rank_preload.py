"""Imported once in the process that ranks are forked from: what takes each of them seconds."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.comm
import deepspeed.module_inject.layers  # noqa: F401
import transformers.models.falcon.modeling_falcon
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401

import cluster.engine.model.causal_lm
import cluster.engine.model.openelm  # noqa: F401
