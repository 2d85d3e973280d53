from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RANK_PHASE_UNSPECIFIED: _ClassVar[RankPhase]
    RANK_PHASE_STARTING: _ClassVar[RankPhase]
    RANK_PHASE_LOADING: _ClassVar[RankPhase]
    RANK_PHASE_WARMING_UP: _ClassVar[RankPhase]
    RANK_PHASE_READY: _ClassVar[RankPhase]
    RANK_PHASE_FAILED: _ClassVar[RankPhase]
RANK_PHASE_UNSPECIFIED: RankPhase
RANK_PHASE_STARTING: RankPhase
RANK_PHASE_LOADING: RankPhase
RANK_PHASE_WARMING_UP: RankPhase
RANK_PHASE_READY: RankPhase
RANK_PHASE_FAILED: RankPhase

class ModelDeployment(_message.Message):
    __slots__ = ("model", "served_model_name", "replicas", "tensor_parallel_size", "pipeline_parallel_size", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "block_size", "device_memory_utilization", "kv_cache_bytes", "device", "revision", "enable_prefix_caching", "load_format", "seed", "rope_scaling", "max_waiting_prompt_tokens", "prefill_slowdown")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ENABLE_PREFIX_CACHING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ROPE_SCALING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    model: str
    served_model_name: str
    replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    block_size: int
    device_memory_utilization: float
    kv_cache_bytes: int
    device: str
    revision: str
    enable_prefix_caching: bool
    load_format: str
    seed: int
    rope_scaling: str
    max_waiting_prompt_tokens: int
    prefill_slowdown: float
    def __init__(self, model: _Optional[str] = ..., served_model_name: _Optional[str] = ..., replicas: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., dtype: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., max_num_waiting: _Optional[int] = ..., block_size: _Optional[int] = ..., device_memory_utilization: _Optional[float] = ..., kv_cache_bytes: _Optional[int] = ..., device: _Optional[str] = ..., revision: _Optional[str] = ..., enable_prefix_caching: _Optional[bool] = ..., load_format: _Optional[str] = ..., seed: _Optional[int] = ..., rope_scaling: _Optional[str] = ..., max_waiting_prompt_tokens: _Optional[int] = ..., prefill_slowdown: _Optional[float] = ...) -> None: ...

class ClusterSpec(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelDeployment]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelDeployment, _Mapping]]] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: ClusterSpec
    def __init__(self, spec: _Optional[_Union[ClusterSpec, _Mapping]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[PlanSummary]
    def __init__(self, plans: _Optional[_Iterable[_Union[PlanSummary, _Mapping]]] = ...) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("model", "tensor_parallel_size", "pipeline_parallel_size", "weight_bytes_per_rank", "max_concurrent_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    weight_bytes_per_rank: _containers.RepeatedScalarFieldContainer[int]
    max_concurrent_tokens: int
    def __init__(self, model: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., weight_bytes_per_rank: _Optional[_Iterable[int]] = ..., max_concurrent_tokens: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("cluster_name", "epoch", "models", "replicas", "processes")
    CLUSTER_NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    cluster_name: str
    epoch: int
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessStatus]
    def __init__(self, cluster_name: _Optional[str] = ..., epoch: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[ProcessStatus, _Mapping]]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "source", "desired_replicas", "ready_replicas", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "checkpoint_digest", "blocked_reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESIRED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    desired_replicas: int
    ready_replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    checkpoint_digest: str
    blocked_reason: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., desired_replicas: _Optional[int] = ..., ready_replicas: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., blocked_reason: _Optional[str] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica", "model", "slot", "generation", "phase", "phase_age_s", "reason", "engine_address", "bytes_loaded", "bytes_total", "activity", "failures_in_a_row")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PHASE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    FAILURES_IN_A_ROW_FIELD_NUMBER: _ClassVar[int]
    replica: str
    model: str
    slot: int
    generation: int
    phase: str
    phase_age_s: float
    reason: str
    engine_address: str
    bytes_loaded: int
    bytes_total: int
    activity: Activity
    failures_in_a_row: int
    def __init__(self, replica: _Optional[str] = ..., model: _Optional[str] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., phase: _Optional[str] = ..., phase_age_s: _Optional[float] = ..., reason: _Optional[str] = ..., engine_address: _Optional[str] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., activity: _Optional[_Union[Activity, _Mapping]] = ..., failures_in_a_row: _Optional[int] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("running_sequences", "waiting_sequences", "kv_blocks_used", "kv_blocks_total")
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    running_sequences: int
    waiting_sequences: int
    kv_blocks_used: int
    kv_blocks_total: int
    def __init__(self, running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ...) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("kind", "pid", "node", "ports", "rank")
    class PortsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    kind: str
    pid: int
    node: str
    ports: _containers.ScalarMap[str, int]
    rank: RankStatus
    def __init__(self, kind: _Optional[str] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., ports: _Optional[_Mapping[str, int]] = ..., rank: _Optional[_Union[RankStatus, _Mapping]] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("replica", "rank", "generation", "device", "phase", "step", "step_age_s", "bytes_loaded", "bytes_total", "report_age_s", "log_file", "peak_host_bytes")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LOG_FILE_FIELD_NUMBER: _ClassVar[int]
    PEAK_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    rank: int
    generation: int
    device: str
    phase: str
    step: int
    step_age_s: float
    bytes_loaded: int
    bytes_total: int
    report_age_s: float
    log_file: str
    peak_host_bytes: int
    def __init__(self, replica: _Optional[str] = ..., rank: _Optional[int] = ..., generation: _Optional[int] = ..., device: _Optional[str] = ..., phase: _Optional[str] = ..., step: _Optional[int] = ..., step_age_s: _Optional[float] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., report_age_s: _Optional[float] = ..., log_file: _Optional[str] = ..., peak_host_bytes: _Optional[int] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("model", "replicas")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    model: str
    replicas: int
    def __init__(self, model: _Optional[str] = ..., replicas: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("replica", "deadline_s")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    replica: str
    deadline_s: float
    def __init__(self, replica: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("node", "deadline_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    deadline_s: float
    def __init__(self, node: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainNodeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("drain_deadline_s",)
    DRAIN_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    drain_deadline_s: float
    def __init__(self, drain_deadline_s: _Optional[float] = ...) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEndpointsRequest(_message.Message):
    __slots__ = ("router_id", "pid", "node", "ports")
    class PortsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    pid: int
    node: str
    ports: _containers.ScalarMap[str, int]
    def __init__(self, router_id: _Optional[str] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., ports: _Optional[_Mapping[str, int]] = ...) -> None: ...

class EndpointTable(_message.Message):
    __slots__ = ("epoch", "endpoints", "models", "state_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    STATE_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    models: _containers.RepeatedScalarFieldContainer[str]
    state_id: str
    def __init__(self, epoch: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., models: _Optional[_Iterable[str]] = ..., state_id: _Optional[str] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("model", "slot", "generation", "address", "checkpoint_digest", "block_size", "draining")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    model: str
    slot: int
    generation: int
    address: str
    checkpoint_digest: str
    block_size: int
    draining: bool
    def __init__(self, model: _Optional[str] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., address: _Optional[str] = ..., checkpoint_digest: _Optional[str] = ..., block_size: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainPlacementRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: ModelDeployment
    def __init__(self, deployment: _Optional[_Union[ModelDeployment, _Mapping]] = ...) -> None: ...

class PlacementExplanation(_message.Message):
    __slots__ = ("feasible", "text", "json")
    FEASIBLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    feasible: bool
    text: str
    json: str
    def __init__(self, feasible: _Optional[bool] = ..., text: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("model", "slot", "generation", "rank", "pid", "node", "host", "device", "phase", "step", "step_age_s", "compute_s", "bytes_loaded", "bytes_total", "ports", "failure", "log_file", "peak_host_bytes", "activity", "checkpoint_digest", "block_size", "waits_for_peer", "needs_change")
    class PortsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOG_FILE_FIELD_NUMBER: _ClassVar[int]
    PEAK_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_PEER_FIELD_NUMBER: _ClassVar[int]
    NEEDS_CHANGE_FIELD_NUMBER: _ClassVar[int]
    model: str
    slot: int
    generation: int
    rank: int
    pid: int
    node: str
    host: str
    device: str
    phase: RankPhase
    step: int
    step_age_s: float
    compute_s: float
    bytes_loaded: int
    bytes_total: int
    ports: _containers.ScalarMap[str, int]
    failure: str
    log_file: str
    peak_host_bytes: int
    activity: Activity
    checkpoint_digest: str
    block_size: int
    waits_for_peer: bool
    needs_change: bool
    def __init__(self, model: _Optional[str] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., phase: _Optional[_Union[RankPhase, str]] = ..., step: _Optional[int] = ..., step_age_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., ports: _Optional[_Mapping[str, int]] = ..., failure: _Optional[str] = ..., log_file: _Optional[str] = ..., peak_host_bytes: _Optional[int] = ..., activity: _Optional[_Union[Activity, _Mapping]] = ..., checkpoint_digest: _Optional[str] = ..., block_size: _Optional[int] = ..., waits_for_peer: _Optional[bool] = ..., needs_change: _Optional[bool] = ...) -> None: ...

class ReportRankResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
