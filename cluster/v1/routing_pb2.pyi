from cluster.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteExplanation(_message.Message):
    __slots__ = ("policy", "model", "prompt_tokens", "endpoints")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    model: str
    prompt_tokens: int
    endpoints: _containers.RepeatedCompositeFieldContainer[EndpointVerdict]
    def __init__(self, policy: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[EndpointVerdict, _Mapping]]] = ...) -> None: ...

class EndpointVerdict(_message.Message):
    __slots__ = ("replica", "generation", "address", "filters", "scores", "total", "tokens", "queued_tokens", "cached_tokens", "standing", "looked_at", "taken", "qualifies")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    LOOKED_AT_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    QUALIFIES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    generation: int
    address: str
    filters: _containers.RepeatedCompositeFieldContainer[FilterVerdict]
    scores: _containers.RepeatedCompositeFieldContainer[ScorerVerdict]
    total: float
    tokens: int
    queued_tokens: int
    cached_tokens: int
    standing: str
    looked_at: bool
    taken: bool
    qualifies: bool
    def __init__(self, replica: _Optional[str] = ..., generation: _Optional[int] = ..., address: _Optional[str] = ..., filters: _Optional[_Iterable[_Union[FilterVerdict, _Mapping]]] = ..., scores: _Optional[_Iterable[_Union[ScorerVerdict, _Mapping]]] = ..., total: _Optional[float] = ..., tokens: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., standing: _Optional[str] = ..., looked_at: _Optional[bool] = ..., taken: _Optional[bool] = ..., qualifies: _Optional[bool] = ...) -> None: ...

class FilterVerdict(_message.Message):
    __slots__ = ("name", "passes", "required")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    name: str
    passes: bool
    required: bool
    def __init__(self, name: _Optional[str] = ..., passes: _Optional[bool] = ..., required: _Optional[bool] = ...) -> None: ...

class ScorerVerdict(_message.Message):
    __slots__ = ("name", "weight", "score")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    score: float
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., score: _Optional[float] = ...) -> None: ...
