"""The model that all contenders load: a Llama with random weights, written once for each shape and seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def make(folder: Path, shape: dict, seed: int) -> Path:
    """The folder of the checkpoint; made if it is not there."""
    name = hashlib.sha256(json.dumps([shape, seed], sort_keys=True).encode()).hexdigest()[:16]
    found = folder / name
    if not (found / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)).float()
        model.save_pretrained(found)
    return found
