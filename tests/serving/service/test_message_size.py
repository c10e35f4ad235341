"""The fields of a message are counted before it is parsed."""

import pytest

from serving.errors import InvalidRequest
from serving.proto import inference_pb2 as pb
from serving.service.message_size import MAX_FIELDS, check_fields, counting

DESCRIPTOR = pb.GenerateRequest.DESCRIPTOR


def test_fields_of_messages_within_messages_count() -> None:
    """A chat is one field, and so is each of its messages and each field of these."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 300)] * 2048)
    data = pb.GenerateRequest(chat=chat).SerializeToString()
    check_fields(data, DESCRIPTOR)
    assert counting(pb.GenerateRequest.FromString)(data).chat == chat
    most = pb.Chat(messages=[pb.ChatMessage()] * (MAX_FIELDS - 1))
    check_fields(pb.GenerateRequest(chat=most).SerializeToString(), DESCRIPTOR)
    most.messages.add()
    with pytest.raises(InvalidRequest, match="more than 16,384 fields"):
        check_fields(pb.GenerateRequest(chat=most).SerializeToString(), DESCRIPTOR)


@pytest.mark.parametrize(
    "data",
    [
        pb.GenerateRequest(stop=["a"] * 400_000).SerializeToString(),
        pb.GenerateRequest(
            sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(100_000), 1.0))
        ).SerializeToString(),
        b"\x80\x7d\x01" * 100_000,  # a field that the message does not have
        b"\x10\x01" * 100_000,  # numbers of TokenIds.ids one by one would be as these
    ],
    ids=["stop", "logit_bias", "unknown", "numbers"],
)
def test_lists_and_maps_count_by_their_entries(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="more than 16,384 fields"):
        counting(pb.GenerateRequest.FromString)(data)


def test_packed_numbers_and_texts_are_one_field() -> None:
    for message in (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(1_000_000))),
        pb.GenerateRequest(text="\n\x00" * 1_000_000),
    ):
        assert counting(pb.GenerateRequest.FromString)(message.SerializeToString()) == message


@pytest.mark.parametrize("data", [b"\xff" * 100_000, b"\x0f" * 100_000, b"\x0a\xff\xff\xff\x7f"])
def test_what_is_no_message_is_left_to_the_parser(data: bytes) -> None:
    check_fields(data, DESCRIPTOR)


@pytest.mark.parametrize("group", [b"\x0b\x0c", b"\xa3\x06\xa4\x06", b"\x0b" * 9])
def test_a_group_hides_nothing_that_stands_behind_it(group: bytes) -> None:
    """The parser reads groups, although version 3 has none, and goes on behind them."""
    chat = pb.Chat(messages=[pb.ChatMessage()] * 100_000)
    data = group + pb.GenerateRequest(chat=chat).SerializeToString()
    with pytest.raises(InvalidRequest, match="a group"):
        counting(pb.GenerateRequest.FromString)(data)


def test_unknown_fields_have_few_bytes() -> None:
    """A field of number 1000 with as many bytes as are allowed, and one more."""
    known = pb.GenerateRequest(text="x" * 100_000).SerializeToString()
    most = known + b"\xc2\x3e\x80\x80\x04" + b"x" * 2**16
    assert counting(pb.GenerateRequest.FromString)(most).text == "x" * 100_000
    with pytest.raises(InvalidRequest, match="65,536 bytes in fields that this server does not"):
        counting(pb.GenerateRequest.FromString)(most + b"\xc2\x3e\x01x")
