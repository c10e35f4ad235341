"""Every field of every request has a bound, and what exceeds it is refused before it is read."""

from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serving.errors import InvalidRequest
from serving.proto import inference_pb2 as pb
from serving.service.bounds import Bound, Bounds, table

CONTEXT, PROMPT_BYTES = 40, 100
TABLE = table(CONTEXT, PROMPT_BYTES)
BOUNDS = Bounds(CONTEXT, PROMPT_BYTES)
TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
METHODS = pb.DESCRIPTOR.services_by_name["Inference"].methods


def row_of(field: FieldDescriptor) -> str:
    return field.full_name.removeprefix(f"{pb.DESCRIPTOR.package}.")


def is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def ways(descriptor: Descriptor, way: tuple[FieldDescriptor, ...] = ()) -> list[Any]:
    """Every way from a request to a field: the fields that one passes, the field itself last."""
    found = []
    for field in descriptor.fields:
        found.append((*way, field))
        if field.message_type is not None and not is_map(field):
            found += ways(field.message_type, (*way, field))
    return found


WAYS = [(method.input_type, way) for method in METHODS for way in ways(method.input_type)]


def message_with(top: Descriptor, way: tuple[FieldDescriptor, ...], value: Any) -> Message:
    """A request whose only value stands in the last field of the way."""
    message = parent = GetMessageClass(top)()
    *before, field = way
    for step in before:
        child = getattr(parent, step.name)
        parent = child.add() if step.is_repeated else child
    parent.SetInParent()
    if is_map(field):
        getattr(parent, field.name).update(value)
    elif field.is_repeated and field.message_type is not None:
        for _ in range(value):
            getattr(parent, field.name).add()
    elif field.is_repeated:
        getattr(parent, field.name).extend(value)
    else:
        setattr(parent, field.name, value)
    return message


def values(field: FieldDescriptor, bound: Bound) -> list[tuple[Any, Any]]:
    """The largest allowed value of a field, and one beyond it, for each bound that it has."""
    pairs: list[tuple[Any, Any]] = []
    letter: Any = b"a" if field.type == FieldDescriptor.TYPE_BYTES else "a"
    if bound.entries is not None:
        sizes = (bound.entries, bound.entries + 1)
        if is_map(field):
            pairs.append(tuple(dict.fromkeys(range(size), 1.0) for size in sizes))
        elif field.message_type is not None:
            pairs.append(sizes)
        else:
            entry = letter if field.type in TEXTS else 1
            pairs.append(tuple([entry] * size for size in sizes))
    if bound.size is not None:
        for letters in (letter, "é" if letter == "a" else letter):
            # Letters of two bytes: two of them less, or half of them, are as many bytes.
            most = bound.size // len(letters.encode() if isinstance(letters, str) else letters)
            texts = [letters * most, letters * (most + 1)]
            pairs.append(tuple([text] if field.is_repeated else text for text in texts))
    if bound.range is not None:
        pairs.append((bound.range[1], bound.range[1] + 1))
    return pairs


@pytest.mark.parametrize(
    ("top", "way"), WAYS, ids=[f"{top.name} {'.'.join(f.name for f in way)}" for top, way in WAYS]
)
def test_a_field_has_a_bound_that_holds(top: Descriptor, way: tuple[FieldDescriptor, ...]) -> None:
    field = way[-1]
    assert row_of(field) in TABLE, f"give {row_of(field)} a row in serving/service/bounds.py"
    bound = TABLE[row_of(field)]
    assert (bound.entries is not None) == field.is_repeated
    assert (bound.size is not None) == (field.type in TEXTS)
    for allowed, beyond in values(field, bound):
        BOUNDS.check(message_with(top, way, allowed))
        with pytest.raises(InvalidRequest) as caught:
            BOUNDS.check(message_with(top, way, beyond))
        assert field.name in str(caught.value) or "the prompt has" in str(caught.value)
        assert len(str(caught.value)) < 200


def test_every_row_is_of_a_field() -> None:
    assert set(TABLE) == {row_of(way[-1]) for _, way in WAYS}


def test_keys_and_values_of_maps_are_numbers() -> None:
    """The bound of a map counts its entries, which is enough for numbers alone."""
    for _, way in WAYS:
        if is_map(way[-1]):
            entry = way[-1].message_type.fields_by_name
            assert not {entry["key"].type, entry["value"].type} & {
                *TEXTS,
                FieldDescriptor.TYPE_MESSAGE,
            }


def test_a_number_of_the_table_has_a_smallest_value_too() -> None:
    with pytest.raises(InvalidRequest, match="^n is 0; it must be within 1 and 16$"):
        BOUNDS.check(pb.GenerateRequest(n=0))


def test_400_000_stop_texts_are_refused_by_their_number() -> None:
    message = pb.GenerateRequest(stop=["a"] * 400_000)
    with pytest.raises(InvalidRequest, match="^stop has 400,000 texts; give at most 16$"):
        BOUNDS.check(message)
