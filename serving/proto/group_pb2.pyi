from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Report(_message.Message):
    __slots__ = ("hello", "room", "ready", "leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    room: Limits
    ready: Ready
    leaving: Leaving
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., room: _Optional[_Union[Limits, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("start", "limits", "step", "end", "masks", "put_layer")
    START_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    PUT_LAYER_FIELD_NUMBER: _ClassVar[int]
    start: Start
    limits: Limits
    step: Step
    end: End
    masks: Masks
    put_layer: PutLayer
    def __init__(self, start: _Optional[_Union[Start, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., masks: _Optional[_Union[Masks, _Mapping]] = ..., put_layer: _Optional[_Union[PutLayer, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("process_id", "num_processes", "host", "facts", "proof")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PROCESSES_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    process_id: int
    num_processes: int
    host: str
    facts: _containers.ScalarMap[str, str]
    proof: bytes
    def __init__(self, process_id: _Optional[int] = ..., num_processes: _Optional[int] = ..., host: _Optional[str] = ..., facts: _Optional[_Mapping[str, str]] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Start(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class End(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("num_pages", "page_size", "max_sequences", "max_step_tokens", "max_context", "max_waiting", "window", "prefix_reuse", "deterministic")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    PREFIX_REUSE_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    page_size: int
    max_sequences: int
    max_step_tokens: int
    max_context: int
    max_waiting: int
    window: int
    prefix_reuse: bool
    deterministic: bool
    def __init__(self, num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_context: _Optional[int] = ..., max_waiting: _Optional[int] = ..., window: _Optional[int] = ..., prefix_reuse: _Optional[bool] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("plans", "has_masks")
    PLANS_FIELD_NUMBER: _ClassVar[int]
    HAS_MASKS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[Plan]
    has_masks: bool
    def __init__(self, plans: _Optional[_Iterable[_Union[Plan, _Mapping]]] = ..., has_masks: _Optional[bool] = ...) -> None: ...

class Masks(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[PlanMasks]
    def __init__(self, plans: _Optional[_Iterable[_Union[PlanMasks, _Mapping]]] = ...) -> None: ...

class PlanMasks(_message.Message):
    __slots__ = ("chunks", "words")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedScalarFieldContainer[int]
    words: bytes
    def __init__(self, chunks: _Optional[_Iterable[int]] = ..., words: _Optional[bytes] = ...) -> None: ...

class PutLayer(_message.Message):
    __slots__ = ("slot", "layer", "matrices")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    slot: int
    layer: int
    matrices: _containers.RepeatedCompositeFieldContainer[LowRank]
    def __init__(self, slot: _Optional[int] = ..., layer: _Optional[int] = ..., matrices: _Optional[_Iterable[_Union[LowRank, _Mapping]]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("target", "a_shape", "a", "b_shape", "b")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    A_SHAPE_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_SHAPE_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    target: str
    a_shape: _containers.RepeatedScalarFieldContainer[int]
    a: bytes
    b_shape: _containers.RepeatedScalarFieldContainer[int]
    b: bytes
    def __init__(self, target: _Optional[str] = ..., a_shape: _Optional[_Iterable[int]] = ..., a: _Optional[bytes] = ..., b_shape: _Optional[_Iterable[int]] = ..., b: _Optional[bytes] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("chunks", "copies")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    copies: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., copies: _Optional[_Iterable[int]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("request_id", "choice", "token_ids", "start", "pages", "follows", "samples", "sampling", "seed", "prompt_length", "history", "forbidden", "guesses", "slot", "targets", "target_start", "asked")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    FORBIDDEN_FIELD_NUMBER: _ClassVar[int]
    GUESSES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TARGET_START_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    start: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    follows: int
    samples: bool
    sampling: Sampling
    seed: int
    prompt_length: int
    history: _containers.RepeatedScalarFieldContainer[int]
    forbidden: _containers.RepeatedScalarFieldContainer[int]
    guesses: int
    slot: int
    targets: _containers.RepeatedScalarFieldContainer[int]
    target_start: int
    asked: int
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., follows: _Optional[int] = ..., samples: _Optional[bool] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., seed: _Optional[int] = ..., prompt_length: _Optional[int] = ..., history: _Optional[_Iterable[int]] = ..., forbidden: _Optional[_Iterable[int]] = ..., guesses: _Optional[int] = ..., slot: _Optional[int] = ..., targets: _Optional[_Iterable[int]] = ..., target_start: _Optional[int] = ..., asked: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "bias_ids", "bias_values", "seed", "top_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    seed: int
    top_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ..., seed: _Optional[int] = ..., top_logprobs: _Optional[int] = ...) -> None: ...
