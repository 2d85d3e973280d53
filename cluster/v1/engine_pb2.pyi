from cluster.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequenceEnd(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_END_UNSPECIFIED: _ClassVar[SequenceEnd]
    SEQUENCE_END_STOP: _ClassVar[SequenceEnd]
    SEQUENCE_END_LENGTH: _ClassVar[SequenceEnd]
    SEQUENCE_END_CANCELLED: _ClassVar[SequenceEnd]
    SEQUENCE_END_REJECTED_CAPACITY: _ClassVar[SequenceEnd]
    SEQUENCE_END_REJECTED_INVALID: _ClassVar[SequenceEnd]
    SEQUENCE_END_EVICTED_DEADLINE: _ClassVar[SequenceEnd]
    SEQUENCE_END_ABORTED_DEADLINE: _ClassVar[SequenceEnd]
    SEQUENCE_END_REJECTED_DRAINING: _ClassVar[SequenceEnd]
SEQUENCE_END_UNSPECIFIED: SequenceEnd
SEQUENCE_END_STOP: SequenceEnd
SEQUENCE_END_LENGTH: SequenceEnd
SEQUENCE_END_CANCELLED: SequenceEnd
SEQUENCE_END_REJECTED_CAPACITY: SequenceEnd
SEQUENCE_END_REJECTED_INVALID: SequenceEnd
SEQUENCE_END_EVICTED_DEADLINE: SequenceEnd
SEQUENCE_END_ABORTED_DEADLINE: SequenceEnd
SEQUENCE_END_REJECTED_DRAINING: SequenceEnd

class ReplicaIdentity(_message.Message):
    __slots__ = ("model", "slot", "generation", "checkpoint_digest", "block_size")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    model: str
    slot: int
    generation: int
    checkpoint_digest: str
    block_size: int
    def __init__(self, model: _Optional[str] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("include_tokenizer",)
    INCLUDE_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    include_tokenizer: bool
    def __init__(self, include_tokenizer: _Optional[bool] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("identity", "card", "tokenizer_files")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FILES_FIELD_NUMBER: _ClassVar[int]
    identity: ReplicaIdentity
    card: ModelCard
    tokenizer_files: _containers.RepeatedCompositeFieldContainer[TokenizerFile]
    def __init__(self, identity: _Optional[_Union[ReplicaIdentity, _Mapping]] = ..., card: _Optional[_Union[ModelCard, _Mapping]] = ..., tokenizer_files: _Optional[_Iterable[_Union[TokenizerFile, _Mapping]]] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("name", "max_model_len", "vocab_size", "checkpoint_digest", "tokenizer_digest", "end_token_ids", "default_sampling", "max_num_seqs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    vocab_size: int
    checkpoint_digest: str
    tokenizer_digest: str
    end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    default_sampling: _inference_pb2.Sampling
    max_num_seqs: int
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., end_token_ids: _Optional[_Iterable[int]] = ..., default_sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., max_num_seqs: _Optional[int] = ...) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "commands", "resync_blocks", "pauses")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    RESYNC_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PAUSES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    commands: Commands
    resync_blocks: ResyncBlocks
    pauses: Pauses
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., commands: _Optional[_Union[Commands, _Mapping]] = ..., resync_blocks: _Optional[_Union[ResyncBlocks, _Mapping]] = ..., pauses: _Optional[_Union[Pauses, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "expected", "block_events", "block_events_pause_s", "load_pause_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    expected: ReplicaIdentity
    block_events: bool
    block_events_pause_s: float
    load_pause_s: float
    def __init__(self, router_id: _Optional[str] = ..., expected: _Optional[_Union[ReplicaIdentity, _Mapping]] = ..., block_events: _Optional[bool] = ..., block_events_pause_s: _Optional[float] = ..., load_pause_s: _Optional[float] = ...) -> None: ...

class Commands(_message.Message):
    __slots__ = ("submits", "cancels")
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    cancels: _containers.RepeatedCompositeFieldContainer[Cancel]
    def __init__(self, submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[Cancel, _Mapping]]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence_id", "attempt", "prompt_token_ids", "generated_token_ids", "sampling", "logprobs", "priority", "deadline_s", "request_id", "cache_salt")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    attempt: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    generated_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    logprobs: int
    priority: int
    deadline_s: float
    request_id: str
    cache_salt: str
    def __init__(self, sequence_id: _Optional[int] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., generated_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., logprobs: _Optional[int] = ..., priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., request_id: _Optional[str] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    def __init__(self, sequence_id: _Optional[int] = ...) -> None: ...

class ResyncBlocks(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pauses(_message.Message):
    __slots__ = ("block_events_s", "load_s")
    BLOCK_EVENTS_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    block_events_s: float
    load_s: float
    def __init__(self, block_events_s: _Optional[float] = ..., load_s: _Optional[float] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "step", "beat", "blocks")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepUpdate
    beat: Beat
    blocks: BlockEvents
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepUpdate, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: ReplicaIdentity
    def __init__(self, identity: _Optional[_Union[ReplicaIdentity, _Mapping]] = ...) -> None: ...

class StepUpdate(_message.Message):
    __slots__ = ("step", "sequences", "load")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    step: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    load: Load
    def __init__(self, step: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("sequence_id", "attempt", "token_ids", "logprobs", "end", "detail", "cached_prompt_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    end: SequenceEnd
    detail: str
    cached_prompt_tokens: int
    def __init__(self, sequence_id: _Optional[int] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., end: _Optional[_Union[SequenceEnd, str]] = ..., detail: _Optional[str] = ..., cached_prompt_tokens: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("step", "step_age_s", "load")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    step: int
    step_age_s: float
    load: Load
    def __init__(self, step: _Optional[int] = ..., step_age_s: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("sequence_number", "reset", "complete", "stored", "removed")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    reset: bool
    complete: bool
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_number: _Optional[int] = ..., reset: _Optional[bool] = ..., complete: _Optional[bool] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running_sequences", "waiting_sequences", "queued_prompt_tokens", "kv_blocks_used", "kv_blocks_total")
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    running_sequences: int
    waiting_sequences: int
    queued_prompt_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    def __init__(self, running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., queued_prompt_tokens: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "ready", "slots", "token_ids", "token_counts", "token_starts", "new_block_ids", "new_block_counts", "first_blocks", "unsampled", "prompt_counts", "sequence_starts")
    STEP_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STARTS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNSAMPLED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_STARTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    ready: bool
    slots: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_starts: _containers.RepeatedScalarFieldContainer[int]
    new_block_ids: _containers.RepeatedScalarFieldContainer[int]
    new_block_counts: _containers.RepeatedScalarFieldContainer[int]
    first_blocks: _containers.RepeatedScalarFieldContainer[int]
    unsampled: _containers.RepeatedScalarFieldContainer[int]
    prompt_counts: _containers.RepeatedScalarFieldContainer[int]
    sequence_starts: _containers.RepeatedCompositeFieldContainer[SequenceStart]
    def __init__(self, step: _Optional[int] = ..., ready: _Optional[bool] = ..., slots: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_starts: _Optional[_Iterable[int]] = ..., new_block_ids: _Optional[_Iterable[int]] = ..., new_block_counts: _Optional[_Iterable[int]] = ..., first_blocks: _Optional[_Iterable[int]] = ..., unsampled: _Optional[_Iterable[int]] = ..., prompt_counts: _Optional[_Iterable[int]] = ..., sequence_starts: _Optional[_Iterable[_Union[SequenceStart, _Mapping]]] = ...) -> None: ...

class SequenceStart(_message.Message):
    __slots__ = ("slot", "sampling", "logprobs", "prompt_token_ids", "generated_token_ids")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    sampling: _inference_pb2.Sampling
    logprobs: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    generated_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slot: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., logprobs: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., generated_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SampledTokens(_message.Message):
    __slots__ = ("step", "token_ids", "logprob_rows", "logprobs")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_ROWS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    step: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprob_rows: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    def __init__(self, step: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprob_rows: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...
