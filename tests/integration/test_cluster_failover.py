"""What a running cluster survives: dead ranks, clients that leave, wrong input. Two replicas of TP 2, a real router."""

import os
import random
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from cluster_harness import running_cluster
from tiny_models import Reference, build

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ClusterError, ConfigError, NoFeasiblePlan

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

STREAMS = 6
MAX_TOKENS = 120
MB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("llama_gqa", tmp_path_factory.mktemp("model"), seed=5)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(2)
    return [[rng.randrange(3, 320) for _ in range(rng.choice([1, 5, 40]))] for _ in range(STREAMS)]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    return [Reference(folder).generate(prompt, MAX_TOKENS) for prompt in prompts]


def request_for(cluster, prompt, *, sampled):
    """The same request every time: greedy, or seeded with everything that sampling has."""
    request = cluster.client.request(prompt, max_tokens=MAX_TOKENS)
    if sampled:
        request.sampling.temperature, request.sampling.top_p, request.sampling.seed = 0.9, 0.95, 1234
        request.sampling.repetition_penalty, request.sampling.frequency_penalty = 1.2, 0.4
    return request


@pytest.fixture(scope="module")
def undisturbed(cluster, prompts):
    return [cluster.client.tokens(request_for(cluster, prompt, sampled=True))[0] for prompt in prompts]


@pytest.fixture(scope="module")
def cluster(folder):
    model = ModelConfig(
        model=str(folder), served_model_name="tiny", replicas=2, tensor_parallel_size=2, max_model_len=256,
        max_num_seqs=8, max_num_batched_tokens=64, block_size=4, kv_cache_bytes=8 * MB,
    )  # fmt: skip
    with running_cluster(model, cpu_slots=6) as running:
        yield running


@pytest.fixture(autouse=True)
def idle_afterwards(cluster):
    yield
    cluster.until(cluster.idle, 30)


def rounds(config: pytest.Config) -> int:
    return 20 if config.getoption("--long") else 2


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_killed_rank_changes_no_token(
    cluster, folder, prompts, expected, undisturbed, victim, pytestconfig, record_property
):
    rng = random.Random(f"kill a {victim}")
    failovers = 0
    for _ in range(rounds(pytestconfig)):
        replica = rng.choice(["tiny/0", "tiny/1"])
        generation = cluster.replicas()[replica][0]
        pid = cluster.ranks(replica)[0 if victim == "leader" else 1]
        kill_at = rng.randrange(1, STREAMS * MAX_TOKENS)
        seen, lock = [0], threading.Lock()

        def follow(job, seen=seen, lock=lock, kill_at=kill_at, pid=pid):
            prompt, sampled = job
            tokens, end = [], None
            for response in cluster.client.stream(request_for(cluster, prompt, sampled=sampled)):
                tokens.extend(response.chunk.token_ids)
                with lock:
                    before, seen[0] = seen[0], seen[0] + len(response.chunk.token_ids)
                    if before < kill_at <= seen[0]:
                        os.kill(pid, signal.SIGKILL)
                if response.HasField("end"):
                    end = response.end
            return tokens, end

        jobs = [(prompt, sampled) for sampled in (False, True) for prompt in prompts]
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(follow, jobs))
        reference = Reference(folder)
        for (prompt, sampled), (tokens, end), whole in zip(jobs, answers, expected + undisturbed, strict=True):
            assert not sampled or tokens == whole
            if tokens != whole:
                reference.check(prompt, MAX_TOKENS, tokens)
            assert end.usage.generated_tokens == len(tokens)
            failovers += end.usage.failovers
        cluster.until(lambda r=replica, g=generation: cluster.replicas().get(r) == (g + 1, "READY"))
        cluster.until_ready()
        assert pid not in cluster.marked_processes()
    record_property("failovers", failovers)
    assert failovers > 0, "no stream was ever on the replica that died: the test proved nothing"


def test_clients_that_leave_free_their_blocks(cluster):
    def leave_early(index):
        call = cluster.client.stream(cluster.client.request([5, 6, index + 3], max_tokens=200))
        next(iter(call))
        call.cancel()

    with ThreadPoolExecutor(25) as pool:
        list(pool.map(leave_early, range(50)))
    cluster.until(cluster.idle, 15)


def test_requests_and_tokens_cost_no_ray_call(cluster, prompts):
    def calls() -> float:
        found = re.findall(
            r"^cluster_controller_ray_calls_total\{.*\} (\S+)$", cluster.metrics_of("controller"), re.MULTILINE
        )
        return sum(map(float, found))

    before = calls()
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in range(3):
            list(pool.map(lambda p: cluster.client.tokens(cluster.client.request(p, max_tokens=MAX_TOKENS)), prompts))
    assert before > 0
    assert calls() == before
    # Engine and router cannot make one: no module of theirs imports Ray (the import contracts), and the router's
    # process has never loaded it.
    maps = {m.path for m in psutil.Process(cluster.local.router_pid).memory_maps()}
    assert any("grpc" in path for path in maps), "these are a Python process's libraries"
    assert not any("_raylet" in path for path in maps)


def status_of(cluster, **changes):
    fields = {"token_ids": [3, 4, 5], "max_tokens": 4, **changes}
    request = cluster.client.request(**{k: v for k, v in fields.items() if k != "sampling"})
    for name, value in fields.get("sampling", {}).items():
        setattr(request.sampling, name, value)
    with pytest.raises(grpc.RpcError) as refused:
        cluster.client.tokens(request, timeout=20)
    return refused.value.code(), refused.value.details()


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"token_ids": [3] * 300}, grpc.StatusCode.INVALID_ARGUMENT, "256"),
        ({"token_ids": [3] * 250, "max_tokens": 50}, grpc.StatusCode.INVALID_ARGUMENT, "256"),
        ({"token_ids": []}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"token_ids": [99_999]}, grpc.StatusCode.INVALID_ARGUMENT, "99999"),
        ({"sampling": {"temperature": -1.0}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"sampling": {"top_p": 1.5}}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"sampling": {"temperature": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"model": "nobody"}, grpc.StatusCode.NOT_FOUND, "nobody"),
        ({"text": "words", "token_ids": None}, grpc.StatusCode.INVALID_ARGUMENT, "tokenizer"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(cluster, changes, code, says):
    got, details = status_of(cluster, **changes)
    assert got == code
    assert says in details
    assert "\n" not in details


def refused_deployment(cluster, error: type[ClusterError], *models: ModelConfig) -> str:
    before = {p.pid for p in cluster.control.status().processes}
    with pytest.raises(error) as refused:
        cluster.control.apply(models)
    assert {p.pid for p in cluster.control.status().processes} == before, "a refused Apply changed something"
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_bad_deployments_leave_the_cluster_alone(cluster, tmp_path, folder):
    missing = refused_deployment(cluster, ConfigError, ModelConfig(model=str(tmp_path / "nothing")))
    assert "does not exist" in missing
    broken = build("llama_mha", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused_deployment(cluster, ConfigError, ModelConfig(model=str(broken)))
    wrong = build("llama_mha", tmp_path / "wrong")
    config = wrong / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 128'))
    assert "shape" in refused_deployment(cluster, ConfigError, ModelConfig(model=str(wrong)))
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT9ForCausalLM"))
    assert "GPT9ForCausalLM" in refused_deployment(cluster, ConfigError, ModelConfig(model=str(wrong)))
    few = build("llama_uneven", tmp_path / "few", num_attention_heads=3)
    spread = ModelConfig(model=str(few), tensor_parallel_size=4)
    assert "query heads" in refused_deployment(cluster, NoFeasiblePlan, spread)
    crowd = ModelConfig(model=str(folder), served_model_name="crowd", replicas=50)
    refused_deployment(cluster, NoFeasiblePlan, crowd)
    tokens, _ = cluster.client.tokens(cluster.client.request([3, 4, 5], max_tokens=4))
    assert len(tokens) == 4
