"""Every family in every layout gives the tokens that transformers gives, or is refused in a sentence.

One batch per family and layout, in an engine so narrow that prompts are chunked, a sequence is preempted and blocks
are found in the prefix cache. What was seen must be what docs/models.json says; docs/models.md is made from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import NAMED, TOO_BIG, Model, drawn, save, tiny_config
from plain_openelm import PlainOpenELM
from plain_phi3_small import PlainPhi3Small
from rank_pool import Batch, RankPool, Refused
from tiny_models import Reference

from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.servable import check_servable
from cluster.domain.errors import CheckpointError, UnsupportedModelError
from cluster.domain.model_spec import ModelSpec
from cluster.domain.parallel_layout import ParallelLayout
from cluster.engine.model import families, kernels
from cluster.engine.model.conversion import sources
from cluster.engine.model.sharding import shard_model
from cluster.planner.layouts import shape_objection
from cluster.planner.weights import split_stages

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "docs" / "models.json"
SEED = 2026
# Layouts one after the other, as groups of ranks are formed only when their size changes.
LAYOUTS = [ParallelLayout(1), ParallelLayout(1, 2), ParallelLayout(2), ParallelLayout(2, 2), ParallelLayout(4)]
MAX_TOKENS = 12
preempted: list[bool] = []  # of each run


# As ``drawn`` draws them; written down, since drawing takes seconds.
OTHERS = [
    "opt", "nanochat", "cohere2", "ernie4_5_moe", "qwen2_moe", "beam", "ernie4_5", "ministral3", "lfm2", "axk2",
]  # fmt: skip
NAMES = [*NAMED, *OTHERS]


@dataclass
class Case:
    """One family's checkpoint, and what its reference says to every prompt; ``refusal`` where we do not serve it."""

    title: str
    model_type: str
    folder: Path
    spec: ModelSpec | None = None
    refusal: str = ""
    reference: Any = None
    prompts: tuple[tuple[int, ...], ...] = ()
    expected: tuple[list[int], ...] = ()


class Cases:
    """Built when first asked for, kept for the other layouts."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, {}

    def __getitem__(self, name: str) -> Case:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Case:
        folder = self._root / name
        if name in NAMED:
            model = NAMED[name]
            model.build(folder)
        else:
            model = Model(name, name, {})
            save(tiny_config(name), folder)
        case = Case(model.title, model.model_type, folder)
        try:
            case.spec = check_servable(read_checkpoint(folder))
            families.build(families.load_config(read_checkpoint(folder).config), torch.float32)
        except (UnsupportedModelError, CheckpointError) as error:
            case.refusal = str(error).replace(f"{folder}/", "")
            return case
        plain = PLAIN.get(model.model_type)
        case.reference = Reference(folder) if plain is None else PlainReference(plain(folder, model.config))
        case.prompts = _prompts(case.spec.vocab_size)
        case.expected = tuple(case.reference.generate(list(prompt), MAX_TOKENS) for prompt in case.prompts)
        return case


class PlainReference(Reference):
    """Reference's tie rule around a plain forward."""

    def __init__(self, plain: PlainOpenELM | PlainPhi3Small) -> None:
        self.generate, self.logits = plain.generate, plain.logits


# Families that transformers does not have.
PLAIN = {"openelm": PlainOpenELM, "phi3small": PlainPhi3Small}


def _prompts(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Long, short, one token, and two that begin alike for four blocks."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in (3, 17, 30, 1, 22)]
    prompts[4][:16] = prompts[2][:16]
    return tuple(tuple(prompt) for prompt in prompts)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, str]]:
    """Family -> layout -> "exact" or the refusal."""
    return {}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in NAMES], ids=str)
def test_tokens_equal_transformers(
    layout: ParallelLayout, name: str, cases: Cases, pool: RankPool, seen: dict[str, dict[str, str]]
) -> None:
    case = cases[name]
    seen.setdefault(name, {})[str(layout)] = _try(case, layout, pool)


def _try(case: Case, layout: ParallelLayout, pool: RankPool) -> str:
    if case.refusal or case.spec is None:
        return case.refusal
    objection = shape_objection(case.spec, layout, 8)
    if objection is not None:
        return objection
    batch = Batch(case.prompts, MAX_TOKENS, frozenset(case.spec.end_token_ids), rope_by_length=case.spec.rope_by_length)
    stages = tuple((stage.start, stage.stop) for stage in split_stages(case.spec, layout))
    try:
        outcome = pool.run(case.folder, layout.tensor_parallel_size, stages, batch)
    except Refused as refusal:
        return str(refusal)
    for prompt, got, expected in zip(case.prompts, outcome.tokens, case.expected, strict=True):
        case.reference.compare(list(prompt), list(got), expected)
    assert outcome.chunked_prompts >= 2
    preempted.append(outcome.preemptions > 0)
    return "exact"


DOUBTS = {
    "none": None,
    "of a layer": ("cluster.engine.model.cpu_layers._is_usual", False),
    "after the proof": ("cluster.engine.model.cpu_layers._proven", None),
    "no room for gate and up": ("cluster.engine.model.cpu._room", 0),
    "of what follows the last layer": ("cluster.engine.model.last_layer._agree", False),
}


@pytest.mark.skipif(kernels.load() is None, reason="the CPU kernels are not compiled here")
@pytest.mark.parametrize("doubt", DOUBTS)
def test_one_rank_of_two_that_votes_no_keeps_both_from_the_faster_way(
    doubt: str, cases: Cases, pool: RankPool
) -> None:  # fmt: skip
    """Else one of them would wait for sums that the other never makes."""
    case = cases["llama-1"]
    batch = Batch(case.prompts, MAX_TOKENS, frozenset(case.spec.end_token_ids))
    outcome = pool.run(case.folder, 2, ((0, 3),), batch, DOUBTS[doubt])
    for prompt, got, expected in zip(case.prompts, outcome.tokens, case.expected, strict=True):
        case.reference.compare(list(prompt), list(got), expected)
    layers = 3 if doubt in {"none", "of what follows the last layer"} else 0
    mlps = 0 if doubt == "no room for gate and up" else 3
    assert pool.replaced == [(layers, mlps, doubt == "none")] * 2


def test_what_was_seen_is_what_is_published(cases: Cases, seen: dict[str, dict[str, str]]) -> None:
    if sorted(seen) != sorted(NAMES) or any(len(results) != len(LAYOUTS) for results in seen.values()):
        pytest.skip("needs every family in every layout")
    import transformers

    rows = {
        name: {"title": cases[name].title, "model_type": cases[name].model_type, "results": seen[name]}
        for name in NAMES
    }
    found = {"transformers": transformers.__version__, "drawn": OTHERS, "seed": SEED, "families": rows}
    text = json.dumps(found, indent=1) + "\n"
    if not PUBLISHED.is_file() or PUBLISHED.read_text() != text:
        if "WRITE_DOCS" in os.environ:
            PUBLISHED.write_text(text)
        pytest.fail("docs/models.json was not what was seen: run this file with WRITE_DOCS=1, then ops/generate")


def test_the_others_were_drawn_at_random() -> None:
    """From the families whose config shrinks to something that can be tried."""

    def usable(name: str) -> bool:
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                config = tiny_config(name)
                if config.is_encoder_decoder or not getattr(config, "is_decoder", True):
                    return False
                model = AutoModelForCausalLM.from_config(config)
        except Exception:
            return False
        return sum(parameter.numel() for parameter in model.parameters()) < TOO_BIG

    assert drawn(len(OTHERS), SEED, usable) == OTHERS


def test_most_runs_preempted_a_sequence() -> None:
    """Not where sequences end early and leave room for the others."""
    if len(preempted) < 20:
        pytest.skip("needs more runs")
    assert sum(preempted) > 0.8 * len(preempted)


def test_tokens_are_not_degenerate(cases: Cases) -> None:
    """A family whose reference says the same token to everything would prove nothing."""
    for name in NAMED:
        tokens = {token for output in cases[name].expected for token in output}
        assert len(tokens) >= 8, name


def test_more_ranks_than_heads_are_refused_by_planner_and_engine(cases: Cases) -> None:
    case = cases["llama-odd"]
    assert case.spec is not None
    assert "more than the model's 7 query heads" in str(shape_objection(case.spec, ParallelLayout(8), 8))
    assert "more than the model's 3 layers" in str(shape_objection(case.spec, ParallelLayout(1, 4), 8))
    model = families.build(families.load_config(read_checkpoint(case.folder).config), torch.float32)
    with pytest.raises(UnsupportedModelError, match="8 ranks are more than the 7 query heads"):
        shard_model(model, 0, 8, None)


def _build(model_type: str, **fields: Any) -> Any:
    if model_type == "longcat_flash":
        fields["head_dim"] = 8
    return families.build(families.load_config({**tiny_config(model_type).to_dict(), **fields}), torch.float32)


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("mamba", "outside attention"),
        ("llama4_text", "neither causal nor a sliding window"),
        ("bert", "is not causal"),
        ("bart", "an encoder and a decoder"),
        ("diffllama", "once each"),
        ("longcat_flash", r"its layer 0 attends 2 times; .* once each"),
        ("xglm", r"of its 3 layers the attention of 0 can be paged; .* once each"),
        ("doge", "makes a mask of its own"),
        ("rwkv", "is not served"),
    ],
)
def test_what_attention_cannot_page_is_refused(model_type: str, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        _build(model_type)


def test_an_architecture_with_code_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture MyLlamaForCausalLM"):
        _build("llama", architectures=["MyLlamaForCausalLM"])


def test_a_model_type_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'martian'"):
        families.load_config({"model_type": "martian"})


def test_the_window_of_a_mask_reaches_the_attention() -> None:
    """Phi-MoE tells its sliding window to its masks only."""
    model = _build("phimoe", sliding_window=9)
    layers = families.attention_layers(model)
    assert {layer.sliding_window for layer in layers} == {9}
    assert all(model.get_submodule(layer.name).mask_window == 9 for layer in layers)


def test_experts_come_from_their_many_tensors(cases: Cases) -> None:
    """Each expert's w1 and w3 fill their halves of one parameter, and nothing is left open."""
    case = cases["mixtral"]
    checkpoint = read_checkpoint(case.folder)
    model = families.build(families.load_config(checkpoint.config), torch.float32)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    pieces = sources(model, checkpoint.tensors)[name]
    found = {piece.header.name: piece.target_box for piece in pieces}
    assert found["model.layers.1.block_sparse_moe.experts.2.w1.weight"] == ((2, 3), (0, 96), (0, 64))
    assert found["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == ((3, 4), (96, 192), (0, 64))
    assert len(pieces) == 8


def test_a_missing_tensor_is_named(cases: Cases) -> None:
    checkpoint = read_checkpoint(cases["mixtral"].folder)
    model = families.build(families.load_config(checkpoint.config), torch.float32)
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != "model.layers.2.self_attn.q_proj.weight"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight"):
        sources(model, tensors)
    tensors = {n: t for n, t in checkpoint.tensors.items() if "layers.1.block_sparse_moe.experts.3.w1" not in n}
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        sources(model, tensors)


def test_names_without_the_base_prefix_are_found(cases: Cases) -> None:
    """GPT-2 and others were published as the base model alone."""
    checkpoint = read_checkpoint(cases["falcon-7b"].folder)
    model = families.build(families.load_config(checkpoint.config), torch.float32)
    bare = {n.removeprefix("transformer."): replace(t, name=n) for n, t in checkpoint.tensors.items()}
    assert sources(model, bare).keys() == sources(model, checkpoint.tensors).keys()


def test_falcon_under_its_first_names() -> None:
    config = families.load_config(
        {"model_type": "RefinedWeb", "architectures": ["RWForCausalLM"], "n_head": 8, "n_layer": 2, "n_head_kv": 2,
         "hidden_size": 64, "vocab_size": 320, "alibi": False, "bias": False, "parallel_attn": True,
         "auto_map": {"AutoConfig": "configuration_RW.RWConfig"}}
    )  # fmt: skip
    layers = families.attention_layers(families.build(config, torch.float32))
    assert [(layer.heads, layer.kv_heads) for layer in layers] == [(8, 2), (8, 2)]
