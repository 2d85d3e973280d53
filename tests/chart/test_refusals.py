"""What rendering refuses, each in one sentence that names the way out."""

from __future__ import annotations

import re

import pytest
from chart_harness import AUTH, merged, refusal, render

GPU = {"name": "gpu", "deviceKind": "gpu", "devicesPerPod": 8, "replicas": 2}
PVC = {"modelVolume": {"type": "pvc", "pvc": {"claimName": "models"}}}


def model(**settings: object) -> dict:
    return {"models": [{"model": "demo", **settings}]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"auth": {"existingSecret": ""}}, "need a token: name a Secret in auth.existingSecret"),
        ({"auth": {"token": "0123456789abcdef"}}, "both set; keep one"),
        (
            model(tensor_parallel_size=2),
            "wants 2 devices in one pod.*no worker group has more than 1; raise devicesPerPod",
        ),
        ({**model(tensor_parallel_size=8, replicas=3), "workers": [GPU]}, "want 24 devices.*have 16.*raise workers"),
        ({**model(tensor_parallel_size=8, pipeline_parallel_size=3), "workers": [GPU]}, "want 24 devices"),
        ({**model(replicas=2)}, "want 2 devices.*have 1 "),
        ({**model(tensor_parallel_size=1, device="cuda")}, "1 devices of kind cuda in one pod.*more than 0"),
        ({**model(device="cpu", tensor_parallel_size=2), "workers": [GPU]}, "2 devices of kind cpu"),
        ({"workers": []}, "no worker group has more than 0"),
        ({"workers": [{"name": "a"}, {"name": "a"}]}, r"workers\[1\].name: a is taken already"),
        ({"workers": [{"name": "router"}]}, "router is taken already"),
        ({"modelVolume": {"type": "pvc"}}, "name the claim in modelVolume.pvc.claimName"),
        ({"modelVolume": {"type": "local"}}, "modelVolume.local.storageClass"),
        ({"modelVolume": {"type": "hostPath"}}, "modelVolume.hostPath.path"),
        ({"modelVolume": {"type": "hostPath", "hostPath": {"path": "/m"}}}, "acknowledgeNotRestricted: true"),
        (model(model="/models/a"), r"models\[0\].model is /models/a, and modelVolume.type none holds no such folder"),
        ({**model(model="/other/a"), **PVC}, "not below modelVolume.mountPath /models"),
        ({**model(model="/modelsets/a"), **PVC}, "not below modelVolume.mountPath /models"),
        (model(model="org/name"), "a model of the hub; set modelVolume.type hubCache"),
        ({**model(model="org/name"), **PVC}, "a model of the hub"),
        ({"models": [{"model": "demo"}] * 2, "workers": [GPU]}, "Two models are served as demo; give"),
        ({"network": {"ephemeralPorts": "50000 40000"}}, "a first and a larger last port"),
        ({"network": {"ephemeralPorts": "60000 70000"}}, "between 1024 and 65535"),
        ({"network": {"ephemeralPorts": "23000 30000"}}, "overlap; move one"),
        ({"network": {"ephemeralPorts": "15000 19000"}}, "network.ephemeralPorts reaches into the ports up to 19999"),
        ({"config": {"controller": {"rank_ports": [19000, 21000]}}}, "config.controller.rank_ports reaches into"),
        ({"config": {"controller": {"rank_ports": [30000, 20000]}}}, "rank_ports are a first and a larger last port"),
        (model(served_model_name="a b"), r"models\[0\] would be served as \"a b\"; give it a served_model_name"),
        ({"router": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "minReplicas is larger than maxReplicas"),
        (
            {"router": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
            "set router.resources.requests.cpu",
        ),
        (
            {"network": {"ephemeralPorts": "32768 60999"}},
            "network.ephemeralPorts reaches into the ports 50051 to 50062",
        ),
        ({"config": {"controller": {"rank_ports": [50000, 50100]}}}, "rank_ports reaches into the ports 50051"),
        ({"workers": [{"name": "router-metrics"}]}, "router-metrics is taken already"),
    ],
    ids=str,
)
def test_rendering_refuses_with_one_sentence(values: dict, says: str):
    said = refusal(merged(AUTH, values))
    assert "execution error at" in said
    sentence = said.rpartition("): ")[2]
    assert sentence.endswith("."), sentence
    assert ". " not in sentence, sentence
    assert re.search(says, sentence), sentence


def test_a_release_named_like_a_number_is_told_what_to_set():
    assert "set fullnameOverride" in refusal(AUTH, name="3-models")
    assert render({**AUTH, "fullnameOverride": "models"}, name="3-models")


@pytest.mark.parametrize(
    "values",
    [
        {**model(tensor_parallel_size=8), "checks": {"devices": False}},
        {**model(model="/baked/in"), "checks": {"modelPaths": False}},
        {
            **model(model="/given/a"),
            "extraVolumes": [{"name": "a", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "a", "mountPath": "/given"}],
        },
        {**model(model="/models"), **PVC},
        {**model(tensor_parallel_size=8, replicas=0)},
        {**model(tensor_parallel_size=8, pipeline_parallel_size=2), "workers": [GPU]},
    ],
    ids=str,
)
def test_what_is_meant_renders(values: dict):
    assert render(merged(AUTH, values))
