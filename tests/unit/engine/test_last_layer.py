"""The last layer computes only what is sampled from, and nobody can tell but by the time it takes."""

import random

import pytest
import torch

from cluster.engine.model import agreement, attention, cpu, cpu_layers, kernels, last_layer
from cluster.engine.step import SequenceKey, StepEntry, StepPlan
from tests.unit.engine import cpu_models
from tests.unit.engine.cpu_models import ALONE, CPU, SMALL

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the CPU kernels are not compiled here")
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "qwen3-norms-of-heads": ("Qwen3Config", {}),
    "phi3-window": ("Phi3Config", {"sliding_window": 5}),
    "granite-multiplier": ("GraniteConfig", {"residual_multiplier": 0.3, "attention_multiplier": 0.1}),
    "gemma": ("GemmaConfig", {"hidden_activation": "gelu_pytorch_tanh"}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3-no-rotary": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}


def build(name, dtype=torch.float32):
    config, own = FAMILIES[name]
    model, _ = cpu_models.build(config, SMALL | {"head_dim": 16} | own, dtype)
    cpu.prepare(model, ALONE)
    return model


class Run:
    """What ``prune`` asks for, of a base model; ``rows`` the last layer's results of each step."""

    def __init__(self, model):
        self.model, self.calls, self.rows, self.pool = model, 0, [], None

    @torch.inference_mode()
    def __call__(self, plans):
        self.calls += 1
        self.rows.clear()
        shape = self.model.config
        dtype = next(self.model.parameters()).dtype
        kv = attention.LayerKV(shape.num_key_value_heads, 16, 16)
        cache = attention.PagedKVCache({0: kv, 1: kv}, last_layer.BLOCKS, last_layer.BLOCK_SIZE, dtype, CPU)
        self.pool = cache.pools[1]
        attention.install(self.model, cache)
        tables = attention.BlockTables(last_layer.SEQUENCES, 3, CPU)
        return [self._step(plan, tables, cache) for plan in plans]

    def _step(self, plan, tables, cache):
        tables.apply(plan.entries)
        cache.layout = layout = attention.layout_step(plan.entries, tables, last_layer.BLOCK_SIZE)
        output = self.model(input_ids=layout.token_ids[None], position_ids=layout.positions[None], use_cache=False)
        rows = output.last_hidden_state[0]
        self.rows.append(len(rows))
        return rows if len(rows) == len(layout.sampled) else rows[layout.sampled]


def lean(model):
    return model.layers[-1].forward.__self__


def prune(model, run=None, vote=lambda vote: vote):
    return last_layer.prune(model.layers, run or Run(model), vote)


def random_steps(rng, steps):
    """Chunks, ends of prompts and decodes of three sequences beside each other, each up to 48 tokens."""
    done, plans = [0] * 3, []
    for number in range(1, steps + 1):
        entries = []
        for slot in rng.sample(range(3), rng.randint(1, 3)):
            left = last_layer.LONGEST - done[slot]
            count = min(left, rng.choice((1, 1, 2, 16, 17, 30)))
            if not count:
                continue
            blocks = () if done[slot] else tuple(range(3 * slot, 3 * slot + 3))
            ids = tuple(rng.randrange(1, 60) for _ in range(count))
            sample = rng.random() < 0.5
            entries.append(
                StepEntry(SequenceKey(0, slot), slot, ids, done[slot], 0, blocks, sample, last_layer.LONGEST)
            )
            done[slot] += count
        if entries:
            plans.append(StepPlan(number, tuple(entries)))
    return plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_steps_give_the_same(name, dtype):
    """The same results of what is sampled, the same keys and values, and no other rows where that pays."""
    model = build(name, dtype)
    whole, pruned, rng = Run(model), Run(model), random.Random(7)
    examples = [random_steps(rng, 8) for _ in range(6)]
    before = [(whole(plans), whole.pool.keys.clone(), whole.pool.values.clone()) for plans in examples]
    assert prune(model)
    left_out = 0
    for plans, (expected, keys, values) in zip(examples, before, strict=True):
        got = pruned(plans)
        for plan, mine, right, rows in zip(plans, got, expected, pruned.rows, strict=True):
            sampled = sum(entry.sample for entry in plan.entries)
            pays = last_layer.pays(plan.num_tokens, sampled)
            assert rows == (sampled if pays else plan.num_tokens)
            left_out += pays
            assert mine.shape == right.shape
            assert not sampled or agreement.agree(mine, right)
        assert agreement.agree(pruned.pool.keys, keys)
        assert agreement.agree(pruned.pool.values, values)
    assert left_out > 10


@pytest.mark.parametrize(
    ("tokens", "sampled", "pays"),
    [(1, 0, True), (7, 0, True), (16, 1, False), (17, 1, True), (32, 32, False), (64, 32, True), (64, 33, False),
     (512, 8, True), (1, 1, False)],
)  # fmt: skip
def test_a_few_tokens_are_not_worth_a_second_reading_of_weights(tokens, sampled, pays):
    assert last_layer.pays(tokens, sampled) is pays


def test_only_what_is_sampled_goes_through_the_mlp(monkeypatch):
    model = build("gemma")  # in parts, so that they can be watched
    assert prune(model)
    seen, own = [], lean(model)
    mlp, attend = own._mlp, own._o
    monkeypatch.setattr(own, "_mlp", lambda x: seen.append(x.shape[1]) or mlp(x))
    monkeypatch.setattr(own, "_o", lambda x: seen.append(x.shape[1]) or attend(x))
    Run(model)(last_layer._plans())
    assert seen == [2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["llama", "biases"])
def test_keys_and_values_have_a_product_of_their_own_where_it_is_small(name, monkeypatch):
    model = build(name)
    assert prune(model)
    assert lean(model)._kv_of.__self__.out_features == 2 * 2 * 16
    model = build(name)
    monkeypatch.setattr("cluster.engine.model.products._COPY_BYTES", 0)
    assert prune(model)
    assert lean(model)._kv_of == lean(model)._qkv


class Centred(torch.nn.Module):
    """Looks at all tokens."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Known(torch.nn.Module):
    """Adds what it knows of each token of the step."""

    def __init__(self, model):
        super().__init__()
        self._given = []
        model.embed_tokens.register_forward_hook(lambda _module, _args, out: self._given.append(out))

    def forward(self, x):
        return x + self._given.pop()


def centred(model):
    model.norm = Centred()


def known(model):
    model.norm = Known(model)


def backwards(model):
    """Its last layer runs first."""
    forward = model.forward

    def run(**named):
        model.layers = torch.nn.ModuleList(reversed(model.layers))
        try:
            return forward(**named)
        finally:
            model.layers = torch.nn.ModuleList(reversed(model.layers))

    model.forward = run


def twice(model):
    """Its last layer runs once more."""
    forward, layers = model.forward, model.layers

    def run(**named):
        model.layers = torch.nn.ModuleList([*layers, layers[-1]])
        model.config.num_hidden_layers = 3
        try:
            return forward(**named)
        finally:
            model.layers, model.config.num_hidden_layers = layers, 2

    model.forward = run


@pytest.mark.parametrize("spoil", [centred, known, backwards, twice])
def test_what_looks_at_other_rows_gets_them(spoil):
    model = build("llama")
    spoil(model)
    run = Run(model)
    expected = run(last_layer._plans())
    assert not prune(model)
    for mine, right in zip(run(last_layer._plans()), expected, strict=True):
        assert torch.equal(mine, right)
    assert run.rows == [20, 50, 26, 3]


def test_one_no_is_a_no_for_all():
    model, votes = build("llama"), []
    assert not prune(model, vote=lambda vote: votes.append(vote))
    assert votes == [True]
    run = Run(model)
    run(last_layer._plans())
    assert run.rows == [20, 50, 26, 3]


def test_a_layer_of_the_familys_own_is_not_tried(monkeypatch):
    """Nor are there votes: all ranks have the same layers."""
    monkeypatch.setattr(cpu_layers, "replace", lambda *_: False)
    model = build("llama")
    run = Run(model)
    assert not prune(model, run, vote=lambda _: pytest.fail("a vote"))
    assert not run.calls
