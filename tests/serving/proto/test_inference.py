"""The gRPC contract stays the one of version 0.1 for whoever was built against it.

`tests/golden/inference-0.1.txt` has its fields, values and methods, a line each. What came later
has names and numbers of its own.
"""

from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serving.proto import inference_pb2 as pb

RECORDED = Path("tests/golden/inference-0.1.txt").read_text(encoding="utf-8").splitlines()
_TYPES = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def type_of(field: FieldDescriptor) -> str:
    target = field.message_type or field.enum_type
    if target is None:
        return _TYPES[field.type]
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    return "map" if is_map else target.name


def row(prefix: str, field: FieldDescriptor) -> str:
    """A field as `Message.field = number: type`, with what makes it repeated, optional or one of
    several."""
    repeated = "repeated " if field.is_repeated else ""
    choice = field.containing_oneof
    one_of = ""
    if choice is not None:
        is_optional = choice.name == f"_{field.name}"  # as protoc names those it makes up
        one_of = " optional" if is_optional else f" oneof {choice.name}"
    return f"{prefix}.{field.name} = {field.number}: {repeated}{type_of(field)}{one_of}"


def rows() -> set[str]:
    found: set[str] = set()

    def add(prefix: str, message: Descriptor) -> None:
        found.update(row(prefix, field) for field in message.fields)
        for nested in message.nested_types:
            add(f"{prefix}.{nested.name}", nested)

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        add(message.name, message)
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        found.update(f"{enum.name}.{value.name} = {value.number}" for value in enum.values)
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            stream = "stream " if method.server_streaming else ""
            found.add(
                f"{service.name}.{method.name}({method.input_type.name}) -> "
                f"{stream}{method.output_type.name}"
            )
    return found


def test_everything_of_version_0_1_is_as_it_was() -> None:
    """A field that became `optional` since has the same bytes wherever it is sent."""
    assert len(RECORDED) == 60
    assert not set(RECORDED) - rows() - {row.removesuffix(" optional") for row in rows()}


def test_no_number_is_given_twice() -> None:
    """A number of 0.1 has its field of 0.1, and none of a later one."""
    numbers = {line.partition(":")[0] for line in rows()}
    places = [tuple(line.rpartition(" = ")[::2]) for line in numbers if " = " in line]
    by_place = [(place.rpartition(".")[0], number) for place, number in places]
    assert len(by_place) == len(set(by_place))


def test_a_request_of_0_1_asks_for_nothing_new() -> None:
    """Bytes as a client of version 0.1 writes them: the new fields are absent, not set to zero."""
    request = pb.GenerateRequest.FromString(b"\x0a\x0b\x0a\x09\x0a\x04user\x12\x01x" + b"\x20\x05")
    assert request.chat.messages[0].content == "x" and request.max_tokens == 5
    assert not request.HasField("response_format")
    assert not request.chat.tools and not request.chat.HasField("tool_choice")
