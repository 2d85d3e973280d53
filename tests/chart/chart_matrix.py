"""Values to render: every toggle on and off, every kind of volume and worker, alone and in pairs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from chart_harness import AUTH, NEW, OLD, Manifest, Values, merged, render_shared

TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SPREAD = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
PLACED: dict[str, Any] = {
    "nodeSelector": {"pool": "a"},
    "tolerations": [TOLERATION],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]
            }
        },
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "rack", "labelSelector": {"matchLabels": {"a": "b"}}}
            ]
        },
    },
    "topologySpreadConstraints": [{**SPREAD, "labelSelector": {"matchLabels": {"a": "b"}}}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "podAnnotations": {"team": "serving"},
    "podLabels": {"team": "serving"},
    "env": [{"name": "TEAM", "value": "serving"}],
}
LLAMA: dict[str, Any] = {
    "model": "/models/Llama-3.1-405B-Instruct",
    "served_model_name": "llama-405b",
    "tensor_parallel_size": 8,
    "pipeline_parallel_size": 2,
    "device": "cuda",
    "max_model_len": 131072,
    "kv_cache_bytes": 30_000_000_000,
    "device_memory_utilization": 0.92,
}
GPUS: dict[str, Any] = {
    "name": "h100",
    "replicas": 2,
    "devicesPerPod": 8,
    "deviceKind": "gpu",
    "cpuPerDevice": 12,
    "memory": "1200Gi",
    "shmSize": "64Gi",
    "modelBytes": 812_000_000_000,
    "readBytesPerSecond": 1_500_000_000,
}
MONITORS: dict[str, Any] = {
    "serviceMonitor": {"enabled": True, "labels": {"release": "kube-prometheus"}, "interval": "30s"},
    "podMonitor": {"enabled": True, "labels": {"release": "kube-prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "kube-prometheus"}},
    "dashboards": {"enabled": True, "annotations": {"grafana_folder": "llm-cluster"}},
}
EXTRA_OBJECT = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "{{ .Release.Name }}-extra"},
    "data": {"a": "b"},
}

CASES: dict[str, Values] = {
    "defaults": {},
    "token": {"auth": {"token": "0123456789abcdef", "existingSecret": ""}},
    "another key": {"auth": {"existingSecret": "other", "key": "ray"}},
    "names": {"fullnameOverride": "models", "nameOverride": "serving", "clusterName": "east"},
    "images": {
        "image": {
            "registry": "registry.example.com/ai",
            "tag": "1.2.3",
            "pullPolicy": "Always",
            "pullSecrets": ["registry"],
            "digests": {"router": "sha256:" + "a" * 64},
        }
    },
    "no models": {"models": []},
    "two models": {
        "models": [{"model": "demo"}, {"model": "demo", "served_model_name": "second", "max_model_len": 4096}],
        "workers": [{"name": "workers", "devicesPerPod": 2}],
    },
    "no replica": {"models": [{"model": "demo", "replicas": 0}]},
    "no workers": {"workers": [], "models": []},
    "gpus": {"models": [LLAMA], "workers": [GPUS], "modelVolume": {"type": "pvc", "pvc": {"claimName": "models"}}},
    "several groups": {
        "models": [{**LLAMA, "model": "/models/a"}, {"model": "demo", "device": "cpu", "tensor_parallel_size": 2}],
        "workers": [GPUS, {"name": "cpu", "replicas": 3, "devicesPerPod": 2, "cpuPerDevice": 0.5, **PLACED}],
        "modelVolume": {"type": "pvc", "pvc": {"claimName": "models", "subPath": "hf"}},
    },
    "config": {
        "config": {
            "router": {"failover_wait_s": 30, "max_failovers": 2, "drain_deadline_s": 12.5},
            "controller": {"rank_ports": [21000, 22999], "rank_silence_s": 7.5, "drain_deadline_s": 90},
        }
    },
    "placed": {"controller": PLACED, "router": PLACED, "workers": [{"name": "workers", **PLACED}]},
    "persistent": {"controller": {"persistence": {"enabled": True, "storageClass": "fast"}}},
    "persistent on a given claim": {"controller": {"persistence": {"enabled": True, "existingClaim": "state"}}},
    "fast network": {
        "workers": [
            {
                **GPUS,
                "updateStrategy": "OnDelete",
                "resources": {
                    "requests": {"ephemeral-storage": "50Gi"},
                    "limits": {"rdma/hca": 1, "cpu": "96", "ephemeral-storage": "100Gi"},
                },
            }
        ]
    },
    "autoscaled": {"router": {"autoscaling": {"enabled": True}}},
    "no budgets": {
        "router": {"podDisruptionBudget": {"enabled": False}},
        "workers": [{"name": "workers", "podDisruptionBudget": {"enabled": False}}],
    },
    "controller stays": {"controller": {"podDisruptionBudget": {"enabled": True}}},
    "budget in percent": {"router": {"podDisruptionBudget": {"maxUnavailable": "25%"}}},
    "load balancer": {
        "router": {
            "service": {
                "type": "LoadBalancer",
                "port": 443,
                "annotations": {"a": "b"},
                "externalTrafficPolicy": "Local",
                "loadBalancerClass": "example.com/internal",
                "loadBalancerSourceRanges": ["192.0.2.0/24"],
            }
        }
    },
    "node port": {"router": {"service": {"type": "NodePort"}}},
    "no router": {"router": {"replicas": 0}},
    "pvc": {"models": [{"model": "/models/a"}], "modelVolume": {"type": "pvc", "pvc": {"claimName": "models"}}},
    "local": {"models": [{"model": "/models/a"}], "modelVolume": {"type": "local", "local": {"storageClass": "disks"}}},
    "hub": {
        "models": [{"model": "org/name", "revision": "main"}],
        "modelVolume": {
            "type": "hubCache",
            "hubCache": {"storageClass": "disks", "size": "2Ti", "controllerSize": "20Gi"},
        },
        "hub": {"tokenSecret": {"name": "hub"}, "endpoint": "https://hub.example.com"},
        "workers": [{"name": "workers", "affinity": PLACED["affinity"]}],
    },
    "host path": {
        "models": [{"model": "/models/a"}],
        "modelVolume": {"type": "hostPath", "hostPath": {"path": "/disks/models", "acknowledgeNotRestricted": True}},
    },
    "network": {"network": {"interface": "eth0", "ephemeralPorts": "30000 32767", "ncclDebug": "INFO"}},
    "no policies": {"networkPolicy": {"enabled": False}},
    "policies": {
        "networkPolicy": {
            "clients": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
            "prometheus": [],
            "dns": [{"ipBlock": {"cidr": "169.254.20.10/32"}}],
            "kubernetesApiCidr": "10.0.0.1/32",
            "hubCidr": "198.51.100.0/24",
        }
    },
    "no rbac": {"rbac": {"create": False}},
    "given accounts": {"serviceAccount": {"create": False, "names": {"controller": "c", "worker": "w", "router": "r"}}},
    "annotated accounts": {"serviceAccount": {"annotations": {"iam": "role"}, "names": {"worker": "readers"}}},
    "monitors": {"metrics": MONITORS},
    "no test": {"tests": {"enabled": False}},
    "drain": {"drain": {"secondsPerToken": 0.2, "longestGenerationSeconds": 1800}},
    "extras": {
        "extraEnv": [{"name": "LLM_CLUSTER_ROUTER__MAX_FAILOVERS", "value": "3"}],
        "extraVolumes": [{"name": "certificates", "configMap": {"name": "given"}}],
        "extraVolumeMounts": [{"name": "certificates", "mountPath": "/certificates", "readOnly": True}],
        "extraObjects": [EXTRA_OBJECT],
    },
}
# Cases that say the same thing in two ways, so no pair of them means anything.
_EITHER = ("models", "workers", "modelVolume", "auth")


def values_of(case: str) -> dict[str, Any]:
    return merged(AUTH, CASES[case])


def pairs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every two cases together that do not contradict each other."""
    for (first, one), (second, other) in itertools.combinations(CASES.items(), 2):
        if one and other and not any(key in one and key in other for key in _EITHER):
            yield f"{first} + {second}", merged(AUTH, one, other)


@functools.cache
def rendered() -> dict[str, list[Manifest]]:
    """What every case makes, for an old and a new Kubernetes, and every pair; not to be changed."""
    cases = {
        f"{case} on {version}": render_shared(values_of(case), kube_version=version)
        for case in CASES
        for version in (OLD, NEW)
    }
    return cases | {name: render_shared(values) for name, values in pairs()}
