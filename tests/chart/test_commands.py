"""What the pods run: commands that the command line knows, a configuration that loads, probes that reach something."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from chart_harness import (
    AUTH,
    command_line,
    component,
    config_file,
    containers,
    matches,
    merged,
    of_kind,
    one,
    pods,
    render,
)
from chart_matrix import CASES, LLAMA, rendered, values_of

from cluster.cli.main import build_app
from cluster.config.load import LoadedConfig, load_config

RUN_DIR = "/var/lib/llm-cluster/c"


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that ``llm-cluster`` would run a command with; a usage error when it does not know them."""
    assert words[0] == "llm-cluster"
    name, command, arguments = build_app().resolve_command(
        None, [w.replace("$(POD_IP)", "192.0.2.1") for w in words[1:]]
    )
    return {"command": name, **command.make_context(name, arguments).params}


def runs(container: dict[str, Any]) -> list[list[str]]:
    """The container's own command, and what it runs before it stops."""
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    words = [command_line(container)]
    if hook and hook[0] == "/bin/sh":
        words.append(shlex.split(hook[2].replace("$POD_IP", "192.0.2.1"))[1:])
    return words


def commands(objects: list[dict]) -> dict[str, dict[str, Any]]:
    found = {}
    for _, pod in pods(objects):
        for container in containers(pod):
            for words in runs(container):
                parameters = parsed(words)
                found[f"{component(pod)} {parameters['command']}"] = parameters
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_command_is_one_of_ours(case: str):
    found = commands(render(values_of(case)))
    assert (
        {"controller controller", "router router"}
        <= set(found)
        <= {
            "controller controller",
            "router router",
            "worker worker",
            "worker drain",
            "test generate",
        }
    )


def test_the_commands_say_what_the_processes_need():
    found = commands(render(values_of("gpus")))
    host = "demo-llm-cluster-controller"
    controller, worker, drain = found["controller controller"], found["worker worker"], found["worker drain"]
    assert (controller["host"], controller["ray_port"], controller["num_cpus"]) == ("192.0.2.1", 6379, 0)
    assert (worker["address"], worker["num_cpus"], worker["num_gpus"]) == (f"{host}:6379", 8, 8)
    assert worker["metrics_port"] == 9100
    assert (drain["node"], drain["controller"], drain["deadline_s"]) == ("192.0.2.1", f"{host}:50052", 6554)
    assert found["router router"]["controller"] == f"{host}:50052"
    assert found["test generate"]["address"] == "demo-llm-cluster-router:50051"
    assert found["test generate"]["model"] == "llama-405b"
    assert {str(parameters["run_dir"]) for parameters in (controller, worker, found["router router"])} == {RUN_DIR}
    assert {str(parameters["token_file"]) for parameters in (controller, worker)} == {
        "/var/run/secrets/llm-cluster/token"
    }


def test_cpu_workers_ask_for_no_gpu():
    worker = commands(render(AUTH))["worker worker"]
    assert (worker["num_cpus"], worker["num_gpus"]) == (1, None)


def test_the_controller_asks_for_the_worker_pods_when_it_may():
    objects = render(AUTH)
    selector = dict(pair.split("=") for pair in commands(objects)["controller controller"]["worker_pods"].split(","))
    selected = [
        component(pod) for _, pod in pods(objects) if matches({"matchLabels": selector}, pod["metadata"]["labels"])
    ]
    assert selected == ["worker"]
    assert not commands(render(values_of("no rbac")))["controller controller"]["worker_pods"]


def settings_of(pod: dict) -> dict[str, str]:
    return {found["name"]: found.get("value", "") for container in containers(pod) for found in container["env"]}


def load(objects: list[dict], pod: dict, folder: Path) -> LoadedConfig:
    """The configuration as the pod's process reads it: the file that is mounted, the pod's environment."""
    file = folder / "cluster.yaml"
    file.write_text(config_file(objects))
    return load_config(file, settings_of(pod), {})


def test_every_rendered_configuration_loads(tmp_path: Path):
    different = {
        (config_file(objects), *sorted(name for name in settings_of(pod) if name.startswith("LLM_CLUSTER_"))): (
            objects,
            pod,
        )
        for objects in rendered().values()
        for _, pod in pods(objects)
    }
    assert len(different) > 30
    for objects, pod in different.values():
        assert load(objects, pod, tmp_path).config.cluster_name in ("east", "demo-llm-cluster")


def test_the_configuration_holds_what_the_values_say(tmp_path: Path):
    objects = render(merged(values_of("gpus"), values_of("config")))
    loaded = load(objects, next(pod for _, pod in pods(objects)), tmp_path)
    (model,) = loaded.config.models
    assert model.model_dump(exclude_unset=True) == LLAMA
    assert (loaded.config.controller.rank_ports, loaded.config.controller.rank_silence_s) == ((21000, 22999), 7.5)
    assert (loaded.config.router.failover_wait_s, loaded.config.router.drain_deadline_s) == (30, 12.5)
    assert set(loaded.sources) == {
        "cluster_name",
        *(f"models.0.{name}" for name in LLAMA),
        *(f"router.{name}" for name in ("drain_deadline_s", "failover_wait_s", "max_failovers")),
        *(f"controller.{name}" for name in ("drain_deadline_s", "rank_ports", "rank_silence_s")),
    }


def test_large_numbers_are_written_in_full():
    """YAML's printer would write 30000000000 as 3e+10, which is no integer."""
    assert "kv_cache_bytes: 30000000000\n" in config_file(render(values_of("gpus")))


def test_the_variables_of_a_pod_are_settings_or_have_another_name():
    """The product refuses a variable of its prefix that it does not know, and Kubernetes makes such from Services."""
    for case, objects in rendered().items():
        for _, pod in pods(objects):
            assert pod["spec"]["enableServiceLinks"] is False, case
            assert all(re.fullmatch("[A-Z][A-Z0-9_]*", name) for name in settings_of(pod)), case


def test_probes_ask_what_they_should():
    asked = {
        component(pod): {
            name: (container[f"{name}Probe"]["httpGet"]["path"], port_of(container, name))
            for container in containers(pod)
            for name in ("startup", "liveness", "readiness")
        }
        for _, pod in pods(render(merged(AUTH, {"tests": {"enabled": False}})))
    }
    process = {"liveness": ("/healthz", 9100), "readiness": ("/readyz", 9100)}
    assert asked == {
        "controller": {**process, "startup": ("/healthz", 9100)},
        "router": {**process, "startup": ("/healthz", 9100)},
        "worker": {**process, "startup": ("/startedz", 9100)},
    }


def port_of(container: dict, probe: str) -> int:
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    return named[container[f"{probe}Probe"]["httpGet"]["port"]]


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        ({}, 600),
        ({"modelBytes": 812_000_000_000, "readBytesPerSecond": 1_500_000_000}, 1150),
        ({"modelBytes": 1, "startupSeconds": 30}, 40),
    ],
)
def test_the_startup_probe_has_time_for_the_models_bytes(group: dict, seconds: int):
    """600 s to join and warm up, and 812 GB at 1.5 GB/s are 542 s: 1142 s, in steps of 10 s."""
    objects = render({**AUTH, "workers": [{"name": "workers", **group}]})
    (container,) = one(objects, "StatefulSet", "-workers")["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] == 10
    assert probe["periodSeconds"] * probe["failureThreshold"] == seconds


def test_ranks_find_their_interface():
    objects = render(values_of("network"))
    environment = {component(pod): settings_of(pod) for _, pod in pods(objects)}
    assert {environment["worker"][f"{name}_SOCKET_IFNAME"] for name in ("NCCL", "GLOO", "TP")} == {"eth0"}
    assert environment["worker"]["NCCL_DEBUG"] == "INFO"
    assert not {"NCCL_SOCKET_IFNAME", "NCCL_DEBUG"} & set(environment["router"])
    sysctls = {component(pod): pod["spec"]["securityContext"].get("sysctls") for _, pod in pods(objects)}
    ports = [{"name": "net.ipv4.ip_local_port_range", "value": "30000 32767"}]
    assert sysctls == {"controller": ports, "worker": ports, "router": None, "test": None}


@pytest.mark.parametrize(
    ("case", "volume", "claim", "read_only"),
    [
        ("pvc", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}, None, True),
        ("local", None, {"storageClassName": "disks", "resources": {"requests": {"storage": "1Ti"}}}, True),
        ("hub", None, {"storageClassName": "disks", "resources": {"requests": {"storage": "2Ti"}}}, None),
        ("host path", {"hostPath": {"path": "/disks/models", "type": "Directory"}}, None, True),
    ],
)
def test_models_are_mounted_where_they_are_read(
    case: str, volume: dict | None, claim: dict | None, read_only: bool | None
):
    objects = render(values_of(case))
    for name in ("-controller", "-workers"):
        found = one(objects, "StatefulSet", name)["spec"]
        pod = found["template"]["spec"]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/models"]
        assert mount.get("readOnly") == read_only
        volumes = [v for v in pod["volumes"] if v["name"] == "models"]
        assert volumes == ([] if volume is None else [{"name": "models", **volume}])
        claims = [c["spec"] for c in found.get("volumeClaimTemplates", []) if c["metadata"]["name"] == "models"]
        if case == "hub" and name == "-controller":  # it fetches headers, never weights
            assert [c["resources"]["requests"]["storage"] for c in claims] == ["20Gi"]
        else:
            assert claims == ([] if claim is None else [{"accessModes": ["ReadWriteOnce"], **claim}])
    router = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert [v for v in router["volumes"] if v["name"] == "models"] == []


def test_a_hub_cache_has_one_downloader_to_a_node():
    objects = render(values_of("hub"))
    worker = one(objects, "StatefulSet", "-workers")["spec"]["template"]
    terms = worker["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [term["topologyKey"] for term in terms] == ["rack", "kubernetes.io/hostname"]
    labels = terms[1]["labelSelector"]["matchLabels"]
    assert labels.items() <= worker["metadata"]["labels"].items()
    assert labels["app.kubernetes.io/component"] == "worker"
    environment = settings_of(worker)
    assert (environment["HF_HOME"], environment["HF_ENDPOINT"]) == ("/models", "https://hub.example.com")
    assert "HF_TOKEN" in environment
    assert "HF_HUB_OFFLINE" not in environment


def test_without_a_hub_cache_pods_are_offline():
    for _, pod in pods(render(values_of("pvc"))):
        if component(pod) in ("controller", "worker"):
            assert settings_of(pod)["HF_HUB_OFFLINE"] == "1"


def test_gpus_are_asked_for():
    (container,) = one(render(values_of("gpus")), "StatefulSet", "-h100")["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "1200Gi"},
        "limits": {"memory": "1200Gi", "nvidia.com/gpu": "8"},
    }


def test_shared_memory_is_memory_and_the_token_is_for_its_owner_and_group():
    objects = render(values_of("gpus"))
    found = {component(pod): {v["name"]: v for v in pod["spec"]["volumes"]} for _, pod in pods(objects)}
    sizes = {name: volumes["shm"]["emptyDir"] for name, volumes in found.items() if "shm" in volumes}
    assert sizes == {
        "controller": {"medium": "Memory", "sizeLimit": "256Mi"},
        "worker": {"medium": "Memory", "sizeLimit": "64Gi"},
    }
    token = {"secretName": "ray-token", "defaultMode": 0o440, "items": [{"key": "token", "path": "token"}]}
    secrets = {name: volumes["token"]["secret"] for name, volumes in found.items() if "token" in volumes}
    assert secrets == {"controller": token, "worker": token}


def test_the_pods_of_a_replica_start_together():
    found = {
        s["metadata"]["name"]: s["spec"].get("podManagementPolicy")
        for s in of_kind(render(values_of("several groups")), "StatefulSet")
    }
    assert found == {
        "demo-llm-cluster-controller": None,
        "demo-llm-cluster-h100": "Parallel",
        "demo-llm-cluster-cpu": "Parallel",
    }


def test_the_images_entrypoint_is_what_the_pods_rely_on():
    dockerfile = Path(__file__).parents[2] / "ops" / "docker" / "Dockerfile"
    assert 'ENTRYPOINT ["/usr/bin/tini", "--", "llm-cluster"]' in dockerfile.read_text()
