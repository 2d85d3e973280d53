"""The chart's values: every name, meaning, bound and default, once.

``helm/llm-cluster/values.yaml`` and ``values.schema.json`` are written from here by ``ops.generators.values``. What the
chart adds is camelCase; what is a setting of the product keeps the name that it has in the configuration file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from cluster.config.schema import MAX_DRAIN_S, ControllerConfig, ModelConfig, RouterConfig
from ops.generators.values_pods import Cidr, Controller, KubernetesObject, Port, Quantity, Router, Section, WorkerGroup

# The chart knows them: it writes them on command lines, in Services and in NetworkPolicies.
SET_BY_THE_CHART = {
    "router": frozenset({"host", "port", "metrics_port"}),
    "controller": frozenset({"host", "port", "metrics_port", "engine_port", "cpu_slots"}),
}


def _first_before_last(value: str) -> str:
    first, last = map(int, value.split())
    if not 1024 <= first < last <= 65535:
        raise ValueError("ephemeralPorts are a first and a larger last port between 1024 and 65535")
    return value


def _settings(name: str, of: type[BaseModel], ours: frozenset[str]) -> type[BaseModel]:
    """The settings of a section of the configuration file that a user of the chart may set; all may be left out."""
    config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    fields: dict[str, Any] = {key: (info.annotation, info) for key, info in of.model_fields.items() if key not in ours}
    derived = Field(
        None,
        ge=0,
        le=MAX_DRAIN_S,
        description="How long running streams may finish at the end; default: what drain says.",
    )
    fields["drain_deadline_s"] = (float | None, derived)
    return create_model(name, __config__=config, __doc__=of.__doc__, **fields)


RouterSettings = _settings("RouterSettings", RouterConfig, SET_BY_THE_CHART["router"])
ControllerSettings = _settings("ControllerSettings", ControllerConfig, SET_BY_THE_CHART["controller"])


class Digests(Section):
    """Images by content; they win over the tag."""

    controller: str = Field("", pattern="^(sha256:[0-9a-f]{64})?$", description="Digest of the controller's image.")
    worker: str = Field("", pattern="^(sha256:[0-9a-f]{64})?$", description="Digest of the workers' image.")
    router: str = Field("", pattern="^(sha256:[0-9a-f]{64})?$", description="Digest of the routers' image.")


class Image(Section):
    """Where the images come from: REGISTRY/PREFIX-controller, -worker and -router."""

    registry: str = Field("", description="Registry and path before the image's name, such as registry.example.com/ai.")
    repository_prefix: str = Field("llm-cluster", min_length=1, description="First part of the three images' names.")
    tag: str = Field(
        "",
        json_schema_extra={"not": {"const": "latest"}},
        description="Tag of the three images, not latest; empty: the chart's appVersion.",
    )
    digests: Digests = Field(Digests(), description="Images by content; a digest wins over the tag.")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent", description="When to pull.")
    pull_secrets: tuple[str, ...] = Field((), description="Names of Secrets with the registry's credentials.")


class Config(Section):
    """The rest of the configuration file."""

    router: RouterSettings = Field(  # type: ignore[valid-type]
        RouterSettings(), description="The routers' settings, named as in the configuration file."
    )
    controller: ControllerSettings = Field(  # type: ignore[valid-type]
        ControllerSettings(), description="The controller's settings, named as in the configuration file."
    )


class Auth(Section):
    """The token with which Ray's nodes know each other. One of the two is needed."""

    existing_secret: str = Field("", description="Name of a Secret that holds the token (recommended).")
    key: str = Field("token", pattern="^[-._a-zA-Z0-9]+$", description="Key of the token inside the Secret.")
    token: str = Field(
        "",
        pattern="^(.{16,})?$",
        description="The token itself, at least 16 characters; the chart makes a Secret of it.",
    )


class PvcVolume(Section):
    """A claim that exists and holds models, for all pods."""

    claim_name: str = Field("", description="Name of the claim; every node must be able to read it.")
    sub_path: str = Field("", description="Folder inside the volume that is mounted.")


class LocalVolume(Section):
    """Local persistent volumes that hold the models: one claim for each worker pod and one for the controller."""

    storage_class: str = Field(
        "", description="Class of the local volumes, with volumeBindingMode WaitForFirstConsumer."
    )
    size: Quantity = Field("1Ti", description="Size that the claims ask for.")


class HubCacheVolume(Section):
    """A cache of the model hub in each worker pod, one pod to a node, and in the controller, which reads models too."""

    storage_class: str = Field("", description="Storage class of the caches; empty: the cluster's default.")
    size: Quantity = Field("1Ti", description="Size of each worker pod's cache.")
    controller_size: Quantity = Field(
        "10Gi",
        description="Size of the controller's, which fetches all files but the weights, and of those the headers.",
    )


class HostPathVolume(Section):
    """A folder of the nodes. The restricted Pod Security Standard forbids it."""

    path: str = Field("", pattern="^(/.*)?$", description="The folder, the same on every node.")
    acknowledge_not_restricted: bool = Field(
        False,
        description="Say true: these pods do not satisfy the restricted Pod Security Standard. Lets extraVolumes be of "
        "any kind too.",
    )


class ModelVolume(Section):
    """Where the models' files are."""

    type: Literal["none", "pvc", "local", "hubCache", "hostPath"] = Field(
        "none",
        description="Which kind of volume; for a change from or to local or hubCache delete the StatefulSets first "
        "(kubectl delete statefulset --cascade=orphan), since their claims cannot be changed.",
    )
    mount_path: str = Field("/models", pattern="^/[^/].*$", description="Where pods see it; models' paths start so.")
    pvc: PvcVolume = Field(PvcVolume(), description="For type pvc: a claim that exists, mounted read-only by all pods.")
    local: LocalVolume = Field(
        LocalVolume(), description="For type local: a claim on a local volume for each worker pod and the controller."
    )
    hub_cache: HubCacheVolume = Field(
        HubCacheVolume(), description="For type hubCache: HF_HOME on a volume of each worker pod and of the controller."
    )
    host_path: HostPathVolume = Field(HostPathVolume(), description="For type hostPath: a folder of the nodes.")


class SecretKey(Section):
    """A key inside a Secret that exists."""

    name: str = Field("", description="Name of the Secret; empty: none.")
    key: str = Field("token", pattern="^[-._a-zA-Z0-9]+$", description="Key inside it.")


class Hub(Section):
    """The model hub, used with modelVolume.type hubCache only; otherwise pods are offline."""

    token_secret: SecretKey = Field(SecretKey(), description="Secret with the hub's token, for models that need one.")
    endpoint: str = Field("", pattern="^(https?://.+)?$", description="Another hub, such as a mirror (HF_ENDPOINT).")


class Drain(Section):
    """How long a pod that is to end lets running generations finish.

    The longest allowed generation sets it: over all models the largest max_model_len times secondsPerToken. The
    result, a day at most, is router.drain_deadline_s and controller.drain_deadline_s, unless config sets them; with
    some seconds added it is the pods' terminationGracePeriodSeconds.
    """

    seconds_per_token: Annotated[float, Field(gt=0, le=10)] = Field(0.05, description="Slowest pace of a generation.")
    longest_generation_seconds: Annotated[int, Field(ge=0, le=int(MAX_DRAIN_S))] = Field(
        600, description="Counts for a model without max_model_len."
    )


class Network(Section):
    """What ranks use to reach each other."""

    interface: str = Field("", description="Interface for NCCL and gloo, such as eth0; empty: they choose.")
    ephemeral_ports: Annotated[str, AfterValidator(_first_before_last)] = Field(
        "40000 49999",
        pattern=r"^[0-9]{4,5} [0-9]{4,5}$",
        description="Ports that the kernel gives Ray, NCCL and gloo: first and last, separated by a space.",
    )
    nccl_debug: Literal["", "VERSION", "WARN", "INFO", "TRACE"] = Field("", description="What NCCL says (NCCL_DEBUG).")


PROMETHEUS_PODS: KubernetesObject = {
    "namespaceSelector": {},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}
# Where NodeLocal DNSCache listens on every node.
DNS_ON_NODES: KubernetesObject = {"ipBlock": {"cidr": "169.254.20.10/32"}}
DNS_PODS: KubernetesObject = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}


class NetworkPolicy(Section):
    """Everything is denied, then exactly the edges that the cluster needs are opened."""

    enabled: bool = Field(True, description="Make NetworkPolicies.")
    clients: tuple[KubernetesObject, ...] = Field(
        ({"podSelector": {}},), description="Who may reach the routers: NetworkPolicyPeers; none: only the test pod."
    )
    prometheus: tuple[KubernetesObject, ...] = Field(
        (PROMETHEUS_PODS,), description="Who may reach /metrics: NetworkPolicyPeers; none: nobody."
    )
    dns: tuple[KubernetesObject, ...] = Field(
        (DNS_PODS, DNS_ON_NODES), description="The DNS servers: NetworkPolicyPeers; NodeLocal DNSCache's address too."
    )
    kubernetes_api_cidr: Cidr = Field("0.0.0.0/0", description="Addresses of the Kubernetes API, for the controller.")
    kubernetes_api_ports: Annotated[tuple[Port, ...], Field(min_length=1)] = Field(
        (443, 6443), description="Ports of the Kubernetes API, of its Service and of its servers."
    )
    hub_cidr: Cidr = Field("0.0.0.0/0", description="Addresses of the model hub, with modelVolume.type hubCache.")


class Rbac(Section):
    """What the controller may do with the Kubernetes API."""

    create: bool = Field(
        True,
        description="Let the controller read pods of its namespace, to say why a worker does not run; false: no pod "
        "gets a token of its ServiceAccount.",
    )


class ServiceAccountNames(Section):
    """Names of ServiceAccounts."""

    controller: str = Field("", description="The controller's; empty: the full name with -controller.")
    worker: str = Field("", description="The workers'; empty: the full name with -worker.")
    router: str = Field("", description="The routers'; empty: the full name with -router.")


class ServiceAccount(Section):
    """The pods' ServiceAccounts. None mounts a token but the controller's."""

    create: bool = Field(True, description="Make them; false: they exist under the names below.")
    names: ServiceAccountNames = Field(ServiceAccountNames(), description="Names of the ServiceAccounts.")
    annotations: dict[str, str] = Field({}, description="Annotations of the ServiceAccounts.")


class Monitor(Section):
    """Scraping through the Prometheus operator."""

    enabled: bool = Field(False, description="Make the object; needs the Prometheus operator's custom resources.")
    labels: dict[str, str] = Field({}, description="Labels by which a Prometheus selects it.")
    interval: Annotated[str, Field(pattern="^[0-9]+(ms|s|m)$")] = Field("15s", description="Pause between scrapes.")


class Rules(Section):
    """Recording and alert rules."""

    enabled: bool = Field(False, description="Make the object; needs the Prometheus operator's custom resources.")
    labels: dict[str, str] = Field({}, description="Labels by which a Prometheus selects it.")


class Dashboards(Section):
    """Grafana dashboards, one ConfigMap each, for Grafana's sidecar."""

    enabled: bool = Field(False, description="Make the ConfigMaps.")
    labels: dict[str, str] = Field(
        {"grafana_dashboard": "1"}, description="Labels by which Grafana's sidecar finds them."
    )
    annotations: dict[str, str] = Field({}, description="Annotations, such as the sidecar's folder.")


class Metrics(Section):
    """What Prometheus and Grafana are given."""

    service_monitor: Monitor = Field(Monitor(), description="A ServiceMonitor for the controller and the routers.")
    pod_monitor: Monitor = Field(Monitor(), description="A PodMonitor for the workers and their ranks.")
    prometheus_rule: Rules = Field(Rules(), description="A PrometheusRule with recording and alert rules.")
    dashboards: Dashboards = Field(Dashboards(), description="Grafana dashboards as ConfigMaps.")


class Tests(Section):
    """What ``helm test`` runs."""

    enabled: bool = Field(True, description="A pod that sends every model a real request.")


class Checks(Section):
    """What rendering refuses."""

    devices: bool = Field(True, description="Models that ask for more devices than the worker groups have.")
    model_paths: bool = Field(True, description="Models whose files no volume holds.")


class Values(Section):
    """Every value of the chart."""

    name_override: str = Field(
        "", pattern="^([a-z0-9]([a-z0-9-]*[a-z0-9])?)?$", description="Replaces the chart's name."
    )
    fullname_override: str = Field(
        "", pattern="^([a-z]([a-z0-9-]{0,28}[a-z0-9])?)?$", description="Replaces the first part of all names."
    )
    cluster_name: str = Field(
        "",
        pattern="^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$",
        description="The configuration's cluster_name; empty: the full name.",
    )
    image: Image = Field(
        Image(), description="Where the images come from: REGISTRY/PREFIX-controller, -worker, -router."
    )
    models: tuple[ModelConfig, ...] = Field(
        (ModelConfig(model="demo"),), description="The models to serve, named as in the configuration file."
    )
    config: Config = Field(Config(), description="The rest of the configuration file.")
    auth: Auth = Field(
        Auth(), description="The token with which Ray's nodes know each other; one of the two is needed."
    )
    controller: Controller = Field(Controller(), description="Ray's head and the controller, in one pod.")
    router: Router = Field(Router(), description="The routers: stateless, every one serves every model.")
    workers: tuple[WorkerGroup, ...] = Field(
        (WorkerGroup(name="workers"),),
        description="Groups of pods that join the cluster as Ray nodes; a replica of a model may span several pods.",
    )
    model_volume: ModelVolume = Field(ModelVolume(), description="Where the models' files are.")
    hub: Hub = Field(Hub(), description="The model hub; without modelVolume.type hubCache all pods are offline.")
    drain: Drain = Field(
        Drain(),
        description="How long a pod that is to end lets generations finish: the longest that a model allows "
        "(max_model_len times secondsPerToken). Sets the drain deadlines, unless config does, and the grace periods.",
    )
    network: Network = Field(Network(), description="What ranks use to reach each other.")
    network_policy: NetworkPolicy = Field(
        NetworkPolicy(), description="Everything is denied, then exactly the edges that the cluster needs are opened."
    )
    rbac: Rbac = Field(Rbac(), description="What the controller may do with the Kubernetes API.")
    service_account: ServiceAccount = Field(ServiceAccount(), description="The pods' ServiceAccounts.")
    metrics: Metrics = Field(Metrics(), description="What Prometheus and Grafana are given.")
    tests: Tests = Field(Tests(), description="What `helm test` runs.")
    checks: Checks = Field(Checks(), description="What rendering refuses.")
    extra_env: tuple[KubernetesObject, ...] = Field((), description="Environment variables of all pods.")
    extra_volumes: tuple[KubernetesObject, ...] = Field((), description="Volumes of all pods.")
    extra_volume_mounts: tuple[KubernetesObject, ...] = Field((), description="Where all containers mount them.")
    extra_objects: tuple[KubernetesObject, ...] = Field(
        (), description="Objects to make besides; strings are templates."
    )
