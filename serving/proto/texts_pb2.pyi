from serving.proto import group_pb2 as _group_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToEngine(_message.Message):
    __slots__ = ("submit", "leave", "ask", "count", "state")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    leave: Leave
    ask: Ask
    count: Count
    state: State
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., count: _Optional[_Union[Count, _Mapping]] = ..., state: _Optional[_Union[State, _Mapping]] = ...) -> None: ...

class ToText(_message.Message):
    __slots__ = ("welcome", "events", "answer", "adapters", "leaving", "ending")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    events: Events
    answer: Answer
    adapters: Adapters
    leaving: Leaving
    ending: Ending
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., events: _Optional[_Union[Events, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., adapters: _Optional[_Union[Adapters, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., ending: _Optional[_Union[Ending, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("number", "id", "prompt_ids", "sampling", "max_tokens", "eos_ids", "min_tokens", "n", "deadline", "caller", "adapter", "salt", "priority", "suspect", "prompt_logprobs", "form", "allowed_ids", "prediction_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IDS_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _group_pb2.Sampling
    max_tokens: int
    eos_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    n: int
    deadline: float
    caller: str
    adapter: str
    salt: bytes
    priority: int
    suspect: bool
    prompt_logprobs: int
    form: Form
    allowed_ids: _containers.RepeatedScalarFieldContainer[int]
    prediction_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_group_pb2.Sampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., eos_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ..., n: _Optional[int] = ..., deadline: _Optional[float] = ..., caller: _Optional[str] = ..., adapter: _Optional[str] = ..., salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., suspect: _Optional[bool] = ..., prompt_logprobs: _Optional[int] = ..., form: _Optional[_Union[Form, _Mapping]] = ..., allowed_ids: _Optional[_Iterable[int]] = ..., prediction_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("grammar", "begins_after")
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    BEGINS_AFTER_FIELD_NUMBER: _ClassVar[int]
    grammar: str
    begins_after: int
    def __init__(self, grammar: _Optional[str] = ..., begins_after: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("number", "choice")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    number: int
    choice: int
    def __init__(self, number: _Optional[int] = ..., choice: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("number", "room", "metrics", "scores", "drain")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    number: int
    room: Room
    metrics: Nothing
    scores: Nothing
    drain: Nothing
    def __init__(self, number: _Optional[int] = ..., room: _Optional[_Union[Room, _Mapping]] = ..., metrics: _Optional[_Union[Nothing, _Mapping]] = ..., scores: _Optional[_Union[Nothing, _Mapping]] = ..., drain: _Optional[_Union[Nothing, _Mapping]] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Room(_message.Message):
    __slots__ = ("n", "caller")
    N_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    n: int
    caller: str
    def __init__(self, n: _Optional[int] = ..., caller: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "error", "has_room", "metrics", "running")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HAS_ROOM_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: Error
    has_room: bool
    metrics: bytes
    running: int
    def __init__(self, number: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., has_room: _Optional[bool] = ..., metrics: _Optional[bytes] = ..., running: _Optional[int] = ...) -> None: ...

class Count(_message.Message):
    __slots__ = ("asked", "finished", "given_up", "violated", "of_adapter")
    ASKED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    VIOLATED_FIELD_NUMBER: _ClassVar[int]
    OF_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    asked: Asked
    finished: Finished
    given_up: GivenUp
    violated: Nothing
    of_adapter: OfAdapter
    def __init__(self, asked: _Optional[_Union[Asked, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., given_up: _Optional[_Union[GivenUp, _Mapping]] = ..., violated: _Optional[_Union[Nothing, _Mapping]] = ..., of_adapter: _Optional[_Union[OfAdapter, _Mapping]] = ...) -> None: ...

class Asked(_message.Message):
    __slots__ = ("n", "max_tokens")
    N_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    n: int
    max_tokens: int
    def __init__(self, n: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "sent", "seated", "first", "last", "prompt_tokens", "tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    SEATED_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    sent: float
    seated: float
    first: float
    last: float
    prompt_tokens: int
    tokens: int
    def __init__(self, reason: _Optional[str] = ..., sent: _Optional[float] = ..., seated: _Optional[float] = ..., first: _Optional[float] = ..., last: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class GivenUp(_message.Message):
    __slots__ = ("reason", "choices")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    reason: str
    choices: int
    def __init__(self, reason: _Optional[str] = ..., choices: _Optional[int] = ...) -> None: ...

class OfAdapter(_message.Message):
    __slots__ = ("adapter", "prompt_tokens", "generation_tokens")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    prompt_tokens: int
    generation_tokens: int
    def __init__(self, adapter: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("is_serving", "keys_failed", "certificate_failed")
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FAILED_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FAILED_FIELD_NUMBER: _ClassVar[int]
    is_serving: bool
    keys_failed: bool
    certificate_failed: bool
    def __init__(self, is_serving: _Optional[bool] = ..., keys_failed: _Optional[bool] = ..., certificate_failed: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("info", "tokenizer", "width", "max_calls", "port", "adapters", "own_port")
    INFO_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    OWN_PORT_FIELD_NUMBER: _ClassVar[int]
    info: bytes
    tokenizer: str
    width: int
    max_calls: int
    port: int
    adapters: Adapters
    own_port: int
    def __init__(self, info: _Optional[bytes] = ..., tokenizer: _Optional[str] = ..., width: _Optional[int] = ..., max_calls: _Optional[int] = ..., port: _Optional[int] = ..., adapters: _Optional[_Union[Adapters, _Mapping]] = ..., own_port: _Optional[int] = ...) -> None: ...

class Adapters(_message.Message):
    __slots__ = ("loaded",)
    LOADED_FIELD_NUMBER: _ClassVar[int]
    loaded: _containers.RepeatedCompositeFieldContainer[AdapterDigest]
    def __init__(self, loaded: _Optional[_Iterable[_Union[AdapterDigest, _Mapping]]] = ...) -> None: ...

class AdapterDigest(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Events(_message.Message):
    __slots__ = ("queued", "numbers", "choices", "tokens", "flags", "computed", "cached", "steps", "seated", "logprobs", "scores", "failures", "is_crowded")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SEATED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    IS_CROWDED_FIELD_NUMBER: _ClassVar[int]
    queued: _containers.RepeatedScalarFieldContainer[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    flags: _containers.RepeatedScalarFieldContainer[int]
    computed: _containers.RepeatedScalarFieldContainer[int]
    cached: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    seated: _containers.RepeatedScalarFieldContainer[float]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    scores: _containers.RepeatedCompositeFieldContainer[Scores]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    is_crowded: bool
    def __init__(self, queued: _Optional[_Iterable[int]] = ..., numbers: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., flags: _Optional[_Iterable[int]] = ..., computed: _Optional[_Iterable[int]] = ..., cached: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ..., seated: _Optional[_Iterable[float]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., scores: _Optional[_Iterable[_Union[Scores, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., is_crowded: _Optional[bool] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("event", "logprob", "top_ids", "top")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    event: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, event: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top: _Optional[_Iterable[float]] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("event", "scores")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    event: int
    scores: _containers.RepeatedCompositeFieldContainer[Score]
    def __init__(self, event: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[Score, _Mapping]]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "top_ids", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top: _Optional[_Iterable[float]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("number", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: Error
    def __init__(self, number: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("name", "message", "retry_after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    message: str
    retry_after: float
    def __init__(self, name: _Optional[str] = ..., message: _Optional[str] = ..., retry_after: _Optional[float] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ending(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...
