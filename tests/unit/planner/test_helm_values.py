"""A plan printed as values: they fit the chart's schema, render as they are, and say what the plan says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chart_harness import CHART, config_file, containers, merged, of_kind, one, pods, render

from cluster.checkpoint.config_json import model_spec
from cluster.config.load import load_config
from cluster.config.schema import ClusterConfig, ModelConfig
from cluster.domain.hardware import Inventory, cpu_device, device_type, uniform_inventory
from cluster.domain.quantities import GB, GIB
from cluster.planner import helm_values as values_module
from cluster.planner.helm_values import Source, helm_values, render_helm_values, seconds_per_token
from cluster.planner.plan import Plan, plan
from ops.generators.values_model import Values


def _published() -> Any:
    spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module.PUBLISHED


PUBLISHED = _published()
DEMO_CONFIG = json.loads((Path(__file__).parents[3] / "cluster/models/demo/config.json").read_text())
H100 = device_type("h100")


class Case:
    """One question to the planner, with its answer."""

    def __init__(
        self, shape: dict[str, Any], inventory: Inventory, source: Source, replicas: int = 1, **config: Any
    ) -> None:
        self.inventory, self.source = inventory, source
        self.spec = model_spec(shape)
        self.config = ModelConfig(model=source.repo_id or source.name, **config)
        self.plan: Plan = plan(self.spec, self.config, inventory, replicas=replicas)
        self.text = render_helm_values(self.plan, self.config, source)
        self.values = helm_values(self.plan, self.config, source)
        self.group = self.values["workers"][0]

    def rendered_config(self, folder: Path) -> ClusterConfig:
        file = folder / "cluster.yaml"
        file.write_text(config_file(render(self.values)))
        return load_config(file, {}, {}).config


CPU = uniform_inventory(1, 4, cpu_device(8 * GIB))
CASES = {
    "demo on a CPU": Case(DEMO_CONFIG, CPU, Source("demo", demo=True), replicas=2, tensor_parallel_size=2),
    "a start larger than what follows": Case(
        DEMO_CONFIG, CPU, Source("demo", demo=True), tensor_parallel_size=2, kv_cache_bytes=2**20, max_model_len=64,
        max_num_seqs=1, max_num_batched_tokens=16,
    ),
    "8B on CPUs": Case(
        PUBLISHED["llama-3-8b"].config, uniform_inventory(2, 2, cpu_device(64 * GIB)), Source("Llama-3-8B"),
        max_num_seqs=8, max_num_batched_tokens=512,
    ),
    "70B on a node": Case(
        PUBLISHED["llama-3.1-70b"].config, uniform_inventory(1, 8, H100), Source("Llama-3.1-70B", stored_bytes=141 * GB)
    ),
    "70B twice on two nodes": Case(
        PUBLISHED["llama-3.1-70b"].config, uniform_inventory(2, 8, H100), Source("Llama 70B"), replicas=3,
        tensor_parallel_size=4, max_model_len=8192, served_model_name="chat",
    ),
    "70B of a hub": Case(
        PUBLISHED["llama-3.1-70b"].config, uniform_inventory(1, 8, H100),
        Source("Llama-3.1-70B", repo_id="meta-llama/Llama-3.1-70B", commit="0" * 40, stored_bytes=141 * GB),
        kv_cache_bytes=20 * GIB,
    ),
    "405B on two nodes": Case(
        PUBLISHED["llama-3.1-405b"].config, uniform_inventory(2, 8, H100), Source("Llama-3.1-405B")
    ),
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each
def test_the_text_is_the_values(case: Case) -> None:
    assert yaml.safe_load(case.text) == case.values
    assert max(map(len, case.text.splitlines())) <= 120


@each
def test_they_satisfy_the_charts_schema(case: Case) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(merged(defaults, case.values), schema, cls=jsonschema.Draft7Validator)
    Values.model_validate(case.values)


@each
def test_the_rendered_config_says_what_the_plan_says(case: Case, tmp_path: Path) -> None:
    (model,) = case.rendered_config(tmp_path).models
    assert (model.tensor_parallel_size, model.pipeline_parallel_size) == (
        case.plan.layout.tensor_parallel_size,
        case.plan.layout.pipeline_parallel_size,
    )
    assert model.replicas == len(case.plan.placements)
    assert model.max_model_len == case.plan.max_model_len
    assert (model.dtype, model.device) == (case.plan.dtype.value, case.plan.device.kind.value)
    assert model.name == case.values["models"][0]["served_model_name"]
    for setting in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "block_size"):
        assert getattr(model, setting) == getattr(case.config, setting)


@each
def test_the_pods_hold_what_was_planned(case: Case, tmp_path: Path) -> None:
    """Planned again on what the pods offer, as the controller will, the model comes out the same."""
    (model,) = case.rendered_config(tmp_path).models
    count, devices = case.group["replicas"], case.group["devicesPerPod"]
    device = case.plan.device
    if device.name == "cpu":
        ray_sees = gib(case.group["memory"]) - values_module.NODE_BYTES - values_module.OBJECT_STORE_BYTES
        device = cpu_device(ray_sees // devices)
    again = plan(case.spec, model, uniform_inventory(count, devices, device), replicas=model.replicas)
    assert (again.layout, again.kv_blocks) == (case.plan.layout, case.plan.kv_blocks)
    assert len(again.placements) == len(case.plan.placements)


def test_a_pod_has_room_for_the_start_where_that_takes_more_than_serving() -> None:
    """Loading takes buffers and a slice twice, before there is a KV cache."""
    case = CASES["a start larger than what follows"]
    starts = [ledger.start_bytes for ledger in case.plan.ledgers]
    assert min(starts) > max(ledger.total_bytes for ledger in case.plan.ledgers) + 50 * 10**6
    ours = gib(case.group["memory"]) - values_module.NODE_BYTES - values_module.OBJECT_STORE_BYTES
    ours -= gib(case.group["shmSize"])
    assert ours * case.config.device_memory_utilization >= sum(starts)
    assert "of a rank" in case.text


@each
def test_the_pods_ask_for_it(case: Case) -> None:
    objects = render(case.values)
    worker = one(objects, "StatefulSet", f"-{case.group['name']}")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert worker["spec"]["replicas"] == len({n for p in case.plan.placements for n in p.node_ids})
    assert limits["memory"] == case.group["memory"]
    gpus = case.plan.device.name != "cpu"
    assert limits.get("nvidia.com/gpu") == (str(case.group["devicesPerPod"]) if gpus else None)
    assert gib(case.group["shmSize"]) < gib(case.group["memory"])
    seconds = container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"]
    assert seconds >= case.group["modelBytes"] / 200_000_000
    grace = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= case.plan.max_model_len * case.plan.cost.tpot_s
    assert len(of_kind(objects, "StatefulSet")) == 2
    assert all(container["image"] for _, pod in pods(objects) for container in containers(pod))


@each
def test_every_number_says_where_it_comes_from(case: Case) -> None:
    text = case.text.splitlines()
    for key in ("cpuPerDevice", "memory", "shmSize", "modelBytes", "secondsPerToken", "tensor_parallel_size"):
        (line,) = [i for i, found in enumerate(text) if re.match(rf"[ -]*{key}: ", found)]
        assert text[line - 1].lstrip().startswith("# "), key


def gib(text: str) -> int:
    match = re.fullmatch(r"(\d+)Gi", text)
    assert match
    return int(match.group(1)) * GIB


def test_nodes_become_pods() -> None:
    two = CASES["405B on two nodes"].group
    assert (two["replicas"], two["devicesPerPod"], two["deviceKind"], two["gpuResource"]) == (
        2, 8, "gpu", "nvidia.com/gpu",
    )  # fmt: skip
    uneven = CASES["70B twice on two nodes"]
    assert (uneven.group["replicas"], uneven.group["devicesPerPod"]) == (2, 8)
    assert "4 device(s) stay free" in uneven.text


def test_bytes_that_a_pod_reads() -> None:
    """A hub's cache fetches everything; from a volume each rank reads its shard."""
    assert CASES["70B of a hub"].group["modelBytes"] == 141 * GB
    shards = CASES["70B on a node"]
    assert shards.group["modelBytes"] == sum(2 * ledger.parameters for ledger in shards.plan.ledgers)
    half = CASES["405B on two nodes"]
    assert half.group["modelBytes"] < 0.6 * sum(2 * ledger.parameters for ledger in half.plan.ledgers)


def test_where_the_model_lies() -> None:
    assert CASES["demo on a CPU"].values["models"][0]["model"] == "demo"
    assert "modelVolume" not in CASES["demo on a CPU"].values
    hub = CASES["70B of a hub"].values
    assert (hub["models"][0]["model"], hub["models"][0]["revision"]) == ("meta-llama/Llama-3.1-70B", "0" * 40)
    assert hub["modelVolume"] == {"type": "hubCache", "mountPath": "/models", "hubCache": {"size": "289Gi"}}
    folder = CASES["70B twice on two nodes"].values
    assert folder["models"][0]["model"] == "/models/Llama 70B"
    assert folder["modelVolume"]["type"] == "pvc"


def test_a_name_with_blanks_can_be_served() -> None:
    case = CASES["70B twice on two nodes"]
    asked = case.config.model_copy(update={"served_model_name": None})
    assert helm_values(case.plan, asked, case.source)["models"][0]["served_model_name"] == "Llama-70B"


def test_a_gpus_product_is_a_hint_and_no_value() -> None:
    assert '# nodeSelector: {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}' in CASES["70B on a node"].text
    assert "nodeSelector" not in CASES["8B on CPUs"].text


@pytest.mark.parametrize(
    ("expected_s", "pace"), [(0.03271, 0.0982), (0.001, 0.005), (0.01, 0.03), (1.23456, 3.71), (9.0, 10.0)]
)
def test_the_pace_of_a_drain(expected_s: float, pace: float) -> None:
    found = CASES["70B on a node"].plan
    assert seconds_per_token(replace(found, cost=replace(found.cost, tpot_s=expected_s))) == pace
