"""Every setting, its meaning, its bounds and its default. Frozen and composed; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from cluster.domain.rope_scaling import canonical_rope_scaling

LOOPBACK = "127.0.0.1"
ROUTER_PORT = 50051
ROUTER_ADDRESS = f"{LOOPBACK}:{ROUTER_PORT}"  # where clients look when they are told nothing else
# A day: longer than a generation of a million tokens takes.
MAX_DRAIN_S = 86_400.0
Port = int
RoutingPolicy = Literal["default", "round_robin", "least_load", "power_of_two", "prefix_aware", "session"]
# Settings that may be written as a mapping, and are one value all the same.
MAPPINGS = frozenset({"rope_scaling"})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(_Section):
    """One model to serve. ``None`` means that the planner decides."""

    model: str = Field(description="Local directory in Hugging Face layout, hub id, or 'demo'.", min_length=1)
    served_model_name: str | None = Field(None, description="Name that clients use; default: the last part of `model`.")
    revision: str | None = Field(None, description="Revision of a hub id; resolved once to a commit.")
    replicas: int = Field(1, ge=0, le=10_000, description="Full copies of the model.")
    tensor_parallel_size: PositiveInt | None = Field(
        None, description="Ranks of one node that share every layer; default: the planner's choice."
    )
    pipeline_parallel_size: PositiveInt | None = Field(
        None, description="Stages of layers, one after the other; default: the planner's choice."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's on an accelerator, float32 on CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where the nodes have it.")
    max_model_len: PositiveInt | None = Field(None, description="Tokens of prompt and output; default: the model's.")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Sequences in one step.")
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="Token budget of one step; default: 2048 on an accelerator, 512 on CPU."
    )
    max_num_waiting: int = Field(256, ge=1, description="Bound of the engine's waiting queue, in requests.")
    max_waiting_prompt_tokens: int = Field(
        1_048_576, ge=1, description="Bound of the engine's waiting queue, in tokens of their prompts."
    )
    prefill_slowdown: float = Field(
        1.7, gt=1, description="A step with running streams may take so many times its own time for a prompt beside."
    )
    enable_prefix_caching: bool = Field(
        True, description="Keep KV blocks of past prompts for prompts that begin alike."
    )
    rope_scaling: str | None = Field(
        None,
        description="Stretches a model's context: TYPE:FACTOR such as linear:2 or yarn:4, or the JSON object that "
        "config.json would hold.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto: read the weights; dummy: make them up, for measurements without a checkpoint."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Of the weights that load_format dummy makes up.")
    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV block.")
    device_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a device's memory that is ours.")
    kv_cache_bytes: PositiveInt | None = Field(
        None, description="KV cache per rank; default: what the device leaves (on CPU at most 1 GiB)."
    )

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _rope_scaling_is_canonical(cls, value: object) -> object:
        return canonical_rope_scaling(value) if isinstance(value, (str, Mapping)) else value

    @field_validator("served_model_name")
    @classmethod
    def _name_is_a_label(cls, value: str | None) -> str | None:
        if value is not None and (not value or len(value) > 128 or any(c.isspace() or c in "/#" for c in value)):
            raise ValueError("a served model name has 1 to 128 characters without spaces, '/' and '#'")
        return value


class RouterConfig(_Section):
    """The router's process."""

    host: str = Field(LOOPBACK, description="Address to bind.")
    port: Port = Field(ROUTER_PORT, ge=0, le=65535, description="gRPC Inference; 0 = any free port.")
    metrics_port: Port = Field(9100, ge=0, le=65535, description="First port tried for /metrics.")
    processes: int = Field(1, ge=1, le=256, description="Processes that share the port, each with bounds of its own.")
    max_concurrent_requests: int = Field(
        16_384,
        ge=1,
        description="Requests in flight, waiting ones included: a bound of memory, blind to priorities and tenants; "
        "over it RESOURCE_EXHAUSTED.",
    )
    max_queued_requests: int = Field(
        1024, ge=1, description="Bound of each model's queue, in requests; over it RESOURCE_EXHAUSTED."
    )
    max_queued_prompt_tokens: int = Field(
        1_048_576, ge=1, description="Bound of each model's queue, in tokens of their prompts."
    )
    max_queue_wait_s: float = Field(
        30.0, gt=0, description="Longest wait for a replica of requests with priority >= 0; then RESOURCE_EXHAUSTED."
    )
    policy: RoutingPolicy = Field(
        "default", description="Who gets a request: the profile of filters and scorers by which replicas are chosen."
    )
    max_index_blocks: int = Field(
        500_000, ge=1, description="KV blocks of each model of which a router remembers who holds them."
    )
    max_failovers: int = Field(8, ge=0, description="Replicas that one request may outlive.")
    failover_wait_s: float = Field(120.0, ge=0, description="How long a started request waits for a ready replica.")
    engine_silence_s: float = Field(2.0, gt=0, description="A leader silent for so long is suspect.")
    engine_step_deadline_s: float = Field(60.0, gt=0, description="A leader whose step runs for so long is suspect.")
    client_stall_s: float = Field(60.0, gt=0, description="A client that takes no message for so long is cut off.")
    drain_deadline_s: float = Field(
        30.0, ge=0, le=MAX_DRAIN_S, description="How long running streams may finish at the end."
    )
    ttft_objective_s: float = Field(
        2.0,
        gt=0,
        description="Goodput: the first token comes within this. Requests in the queue that cannot make it are late: "
        "they stand behind those that can.",
    )
    tpot_objective_s: float = Field(0.2, gt=0, description="Goodput: mean time per later token, at most.")


class ControllerConfig(_Section):
    """The controller's actor."""

    host: str = Field(LOOPBACK, description="Address to bind.")
    port: Port = Field(50052, ge=0, le=65535, description="gRPC Control; 0 = any free port.")
    metrics_port: Port = Field(9100, ge=0, le=65535, description="First port tried for /metrics.")
    engine_port: Port = Field(50060, ge=0, le=65535, description="First port tried by leaders on each host; 0 = any.")
    rank_ports: tuple[int, int] = Field((20000, 23999), description="Rendezvous ports, first and last.")
    cpu_slots: PositiveInt | None = Field(
        None, description="CPU ranks that a Ray started by us offers; default: its cores, or what the models ask for."
    )
    reconcile_interval_s: float = Field(0.5, gt=0, description="Pause between two looks at the cluster.")
    rank_silence_s: float = Field(5.0, gt=0, description="A rank that reports nothing for so long is dead.")
    step_deadline_s: float = Field(60.0, gt=0, description="A step that runs for so long hangs.")
    start_deadline_s: float = Field(600.0, gt=0, description="From PENDING to the first loaded byte.")
    load_stall_s: float = Field(300.0, gt=0, description="A load that makes no progress for so long has failed.")
    restart_backoff_s: float = Field(0.5, ge=0, description="First pause after a failure; doubles up to the next.")
    restart_backoff_max_s: float = Field(60.0, ge=0, description="The longest pause after failures.")
    drain_deadline_s: float = Field(
        30.0, ge=0, le=MAX_DRAIN_S, description="How long running streams may finish at the end."
    )

    @field_validator("rank_ports")
    @classmethod
    def _ports_are_a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= value[0] < value[1] <= 65535:
            raise ValueError("rank_ports are a first and a larger last port between 1024 and 65535")
        return value


class ClusterConfig(_Section):
    """A whole cluster."""

    cluster_name: str = Field("llm-cluster", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    models: tuple[ModelConfig, ...] = ()
    router: RouterConfig = RouterConfig()
    controller: ControllerConfig = ControllerConfig()
    run_dir: str | None = Field(None, description="State, logs and process ids; default: under XDG_RUNTIME_DIR.")

    @model_validator(mode="after")
    def _names_differ(self) -> ClusterConfig:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models are served as {', '.join(twice)}; give one a served_model_name")
        return self
