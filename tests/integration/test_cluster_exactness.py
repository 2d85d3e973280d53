"""Every family at TP 1, 2 and 4, through Ray, router and reflection: exactly the tokens of transformers."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster_harness import running_cluster
from tiny_models import Reference, build

from cluster.config.schema import ModelConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MB = 2**20
MAX_TOKENS = 24
# Each batch is served at once.
BATCHES = (
    (("llama_mha", 1), ("llama_mha", 4), ("llama_uneven", 1), ("llama_uneven", 2), ("llama_tied", 2), ("qwen2", 4)),
    (("llama_gqa", 1), ("llama_gqa", 2), ("llama_gqa", 4), ("llama_tied", 1), ("qwen2", 1), ("qwen2", 2)),
    (("mistral", 1), ("mistral", 2), ("mistral", 4), ("llama_mha", 2), ("llama_odd", 2), ("llama_odd", 4)),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    kinds = {kind for batch in BATCHES for kind, _ in batch}
    return {kind: build(kind, root / kind) for kind in sorted(kinds)}


def served(kind: str, tp: int, folder) -> ModelConfig:
    return ModelConfig(
        model=str(folder), served_model_name=f"{kind}-tp{tp}", tensor_parallel_size=tp, max_model_len=400,
        max_num_seqs=8, max_num_batched_tokens=48, block_size=4, kv_cache_bytes=8 * MB,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(folders):
    kind, tp = BATCHES[0][0]
    with running_cluster(served(kind, tp, folders[kind]), cpu_slots=16) as running:
        yield running
        assert running.idle()


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: "+".join(f"{kind}@{tp}" for kind, tp in batch))
def test_tokens_equal_transformers(cluster, folders, batch):
    cluster.apply(*(served(kind, tp, folders[kind]) for kind, tp in batch))
    rng = random.Random(11)
    lengths = [1, 2, 7, 20, 60, 300]
    prompts = {kind: [[rng.randrange(3, 300) for _ in range(n)] for n in lengths] for kind, _ in batch}
    # Six streams of each model at once, of prompts that differ a hundredfold: batches mix and change all the time.
    jobs = [(kind, tp, prompt) for prompt_index in range(len(lengths)) for kind, tp in batch
            for prompt in [prompts[kind][prompt_index]]]  # fmt: skip
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: cluster.client.tokens(
            cluster.client.request(job[2], max_tokens=MAX_TOKENS, model=f"{job[0]}-tp{job[1]}")), jobs))  # fmt: skip
    references = {kind: Reference(folders[kind]) for kind, _ in batch}
    for (kind, _, prompt), (tokens, end) in zip(jobs, answers, strict=True):
        references[kind].check(prompt, MAX_TOKENS, tokens)
        assert end.usage.generated_tokens == len(tokens)
        assert end.usage.prompt_tokens == len(prompt)
