"""The values of the pods: controller, routers and worker groups. Read with ``values_model``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

KubernetesObject = dict[str, Any]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?$")]
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Percent = Annotated[int, Field(ge=1, le=100)]
Count = Annotated[int, Field(ge=0, le=10_000)]
# "1" or "25%", as Kubernetes takes them.
CountOrPercent = Count | Annotated[str, Field(pattern=r"^[0-9]{1,3}%$")]
# Names of pods are made of a full name of at most 30 characters, a dash and this.
GroupName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$")]


class Section(BaseModel):
    """A part of the values. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class PodSettings(Section):
    """Where pods of a kind run, and what they carry besides."""

    node_selector: dict[str, str] = Field({}, description="Labels that a node must have.")
    tolerations: tuple[KubernetesObject, ...] = Field((), description="Taints that the pods tolerate.")
    affinity: KubernetesObject = Field({}, description="Node and pod affinity, as Kubernetes writes it.")
    topology_spread_constraints: tuple[KubernetesObject, ...] = Field((), description="How pods spread over the nodes.")
    priority_class_name: str = Field("", description="Priority class of the pods.")
    runtime_class_name: str = Field("", description="Runtime class of the pods, such as nvidia.")
    pod_annotations: dict[str, str] = Field({}, description="Annotations of the pods.")
    pod_labels: dict[str, str] = Field({}, description="Labels of the pods.")
    env: tuple[KubernetesObject, ...] = Field((), description="Environment variables, as Kubernetes writes them.")


class Resources(Section):
    """What a container asks for and what it may take at most."""

    requests: dict[str, str | int | float] = Field({}, description="What the scheduler sets aside.")
    limits: dict[str, str | int | float] = Field({}, description="The most that it may take.")


class Persistence(Section):
    """Where the controller's durable state lies."""

    enabled: bool = Field(
        False,
        description="Keep it on a volume of its own, so that it outlives the pod; to change this later without an "
        "existingClaim, delete the StatefulSet first (kubectl delete statefulset --cascade=orphan).",
    )
    size: Quantity = Field("1Gi", description="Size of the volume.")
    storage_class: str = Field("", description="Storage class of the volume; empty: the cluster's default.")
    existing_claim: str = Field("", description="A claim that exists, instead of one that the StatefulSet makes.")


class PodDisruptionBudget(Section):
    """How many pods a drain of nodes may take away at a time."""

    enabled: bool = Field(True, description="Make a PodDisruptionBudget.")
    max_unavailable: CountOrPercent = Field(
        1, description="Pods that may be away at a time, as a number or percentage."
    )


class Controller(PodSettings):
    """Ray's head and the controller, in one pod."""

    resources: Resources = Field(
        Resources(requests={"cpu": "1", "memory": "2Gi"}, limits={"memory": "4Gi"}),
        description="What the pod asks for; memory holds shmSize too.",
    )
    shm_size: Quantity = Field("256Mi", description="Size of /dev/shm, where Ray's object store of 100 MB lies.")
    persistence: Persistence = Field(Persistence(), description="Where the controller's durable state lies.")
    pod_disruption_budget: PodDisruptionBudget = Field(
        PodDisruptionBudget(enabled=False, max_unavailable=0),
        description="Of the controller: keeps a drain of nodes from taking it, and every replica with it, away.",
    )


class Autoscaling(Section):
    """A HorizontalPodAutoscaler for the routers."""

    enabled: bool = Field(False, description="Let Kubernetes choose the number of routers.")
    min_replicas: Annotated[int, Field(ge=1)] = Field(2, description="The least routers.")
    max_replicas: Annotated[int, Field(ge=1)] = Field(8, description="The most routers.")
    target_cpu: Percent = Field(
        70,
        alias="targetCPUUtilizationPercentage",
        description="Mean use of the requested CPU that it aims at.",
    )


class RouterService(Section):
    """The Service that clients reach."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field("ClusterIP", description="Type of the Service.")
    port: Port = Field(50051, description="gRPC port of the Service.")
    annotations: dict[str, str] = Field({}, description="Annotations of the Service.")
    external_traffic_policy: Literal["", "Cluster", "Local"] = Field(
        "", description="For NodePort and LoadBalancer; Local keeps clients' addresses, for networkPolicy.clients."
    )
    load_balancer_class: str = Field(
        "", description="For LoadBalancer, from Kubernetes 1.22 on: who makes it; empty: the cluster's default."
    )
    load_balancer_source_ranges: tuple[Cidr, ...] = Field(
        (), description="For LoadBalancer: addresses that it lets in; none: all."
    )


class Router(PodSettings):
    """The routers: stateless, every one serves every model."""

    replicas: Count = Field(2, description="Routers, when autoscaling is off.")
    autoscaling: Autoscaling = Field(Autoscaling(), description="A HorizontalPodAutoscaler for the routers.")
    pod_disruption_budget: PodDisruptionBudget = Field(
        PodDisruptionBudget(), description="Of the routers: how many may be drained at once."
    )
    service: RouterService = Field(RouterService(), description="The Service that clients reach.")
    resources: Resources = Field(
        Resources(requests={"cpu": "1", "memory": "512Mi"}, limits={"memory": "1Gi"}),
        description="What a router asks for.",
    )


class WorkerGroup(PodSettings):
    """Pods of one kind that join the cluster as Ray nodes. A replica of a model may span several of them."""

    name: GroupName = Field(description="Name of the group, part of its pods' names.")
    replicas: Count = Field(1, description="Pods of the group.")
    devices_per_pod: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Devices of a pod, one rank each.")
    device_kind: Literal["gpu", "cpu"] = Field(
        "cpu", description="What a device is; a CPU device is one slot for a rank."
    )
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        description="Resource that stands for one GPU.",
    )
    cpu_per_device: Annotated[float, Field(gt=0)] = Field(1.0, description="CPU cores requested for each device.")
    memory: Quantity = Field("8Gi", description="Memory of a pod, requested and limit; it holds shmSize too.")
    shm_size: Quantity = Field("2Gi", description="Size of /dev/shm, through which ranks of a pod and NCCL talk.")
    resources: Resources = Field(
        Resources(),
        description="Laid over what follows from the settings above: rdma/hca, ephemeral-storage, cpu limits.",
    )
    model_bytes: Annotated[int, Field(ge=0, le=10**15)] = Field(
        0, description="Bytes that a pod reads or downloads before it serves; sizes the startup probe."
    )
    read_bytes_per_second: Annotated[int, Field(ge=1_000_000)] = Field(
        200_000_000, description="Slowest rate at which a pod reads them; with hubCache the download's."
    )
    startup_seconds: Annotated[int, Field(ge=10, le=1_000_000)] = Field(
        600, description="What joining and warming up may take besides reading."
    )
    update_strategy: Literal["RollingUpdate", "OnDelete"] = Field(
        "RollingUpdate",
        description="How changed pods are replaced: one after the other, or each when somebody deletes it.",
    )
    pod_disruption_budget: PodDisruptionBudget = Field(
        PodDisruptionBudget(), description="Of the group: how many may be drained at once."
    )
