"""Contexts stretched beyond the original length, in real rank processes: mixed batches against each sequence alone."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path

import pytest
import torch
from replica_harness import Replica, Session, submit
from tiny_models import TIE_GAP

pytestmark = pytest.mark.integration

ORIGINAL = 32
FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 211, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def _save(config, folder: Path) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def phi3(tmp_path_factory) -> Path:
    import transformers as hf

    rope = {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS}
    lengths = {"max_position_embeddings": 4 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    return _save(hf.Phi3Config(**TINY, **lengths, rope_parameters=rope), tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Made for 32 tokens; whoever wants more stretches it."""
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = hf.LlamaConfig(**TINY, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    return _save(config, tmp_path_factory.mktemp("llama"))


def _alone(folder: Path, rope: dict, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens of transformers for one sequence, and how far its best logit was ahead.

    A fresh model for each: transformers remembers the longest sequence it has seen.
    """
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(folder)
    config.rope_parameters |= rope
    model = hf.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    best = [row[0].topk(2).values for row in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [float(top[0] - top[1]) for top in best]


def _check(got: list[int], expected: list[int], gaps: list[float], what: str) -> None:
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
    if at is not None:
        assert gaps[at] < TIE_GAP, f"{what}: token {at} is {got[at]} instead of {expected[at]} (gap {gaps[at]})"
        print(f"tie at token {at} of {what}: gap {gaps[at]:.1e}")


def _prompts() -> dict[int, list[int]]:
    """Below, at and beyond the original length; most begin alike, so that blocks could be shared, some in one regime
    and some not."""
    rng = random.Random(5)
    same = [rng.randrange(3, 211) for _ in range(60)]
    other = [rng.randrange(3, 211) for _ in range(9)]
    lengths = (5, 20, 31, 32, 33, 40, 60)
    return {number: same[:length] for number, length in enumerate(lengths)} | {len(lengths): other}


def _prefix_hits(replica: Replica) -> float:
    url = f"http://127.0.0.1:{replica.control.latest[0].ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("cluster_engine_prefix_cache_hits_total"))


@pytest.mark.parametrize(
    ("model", "rope", "layout"),
    [
        ("phi3", {}, {"tp": 2, "pp": 2}),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, {"tp": 2}),
        (
            "llama",
            {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, **FACTORS},
            {},
        ),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}, {}),
    ],
    ids=["phi3-TP2xPP2", "dynamic-TP2", "longrope", "yarn"],
)
def test_sequences_that_pass_the_original_length_in_company(model, rope, layout, request, tmp_path):
    folder, prompts, count = request.getfixturevalue(model), _prompts(), 40
    scaling = json.dumps(rope) if rope else None
    limits = {"max_model_len": 4 * ORIGINAL, "max_num_batched_tokens": 24, "max_num_seqs": 5, "kv_blocks": 96}
    expected = {number: _alone(folder, rope, prompt, count) for number, prompt in prompts.items()}
    with Replica(folder, tmp_path, rope_scaling=scaling, **layout, **limits) as replica:
        replica.wait_ready()
        with replica.channel() as channel:
            session = Session(replica.stub(channel))
            order = list(prompts)
            for turn in range(2):  # the second finds blocks of the first
                ids = {100 * turn + number: number for number in order}
                session.submit(*(submit(i, prompts[number], count) for i, number in ids.items()))
                tokens, _ = session.collect(ids)
                for i, number in ids.items():
                    _check(tokens[i], *expected[number], what=f"{len(prompts[number])} tokens, turn {turn}")
                order.reverse()
            cuts = {1000 + cut: cut for cut in (1, 12, 27, 28, 29, 39)}  # of a prompt of 5: on both sides of 32 tokens
            whole, gaps = expected[0]
            session.submit(*(submit(i, prompts[0], count, generated=whole[:cut]) for i, cut in cuts.items()))
            tokens, _ = session.collect(cuts)
            for i, cut in cuts.items():
                _check(tokens[i], whole[cut:], gaps[cut:], what=f"continuation after {cut}")
            session.close()
        assert _prefix_hits(replica) >= 100  # tokens
