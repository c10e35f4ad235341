"""Who asks: a caller shares prefixes with itself, and nobody can take another's salt or class."""

import itertools

import pytest

from serving.access.caller import Caller
from serving.accounting.caller_fields import NAMES, CallerFields, refuse_caller_fields
from serving.errors import Forbidden
from serving.proto import inference_pb2 as pb


def test_salts_are_equal_for_the_same_caller_and_choice_alone() -> None:
    fields = CallerFields("key")
    choices = [("a", None), ("b", None), ("a", "x"), ("b", "x"), ("a", "b"), ("a", "1"), ("a1", "")]
    salts = {choice: fields.salt(*choice) for choice in choices}
    assert all(len(salt) == 32 for salt in salts.values())
    for one, other in itertools.combinations(choices, 2):
        assert salts[one] != salts[other], (one, other)
    assert {choice: CallerFields("key").salt(*choice) for choice in choices} == salts
    assert CallerFields("other key").salt("a") != salts["a", None]
    assert CallerFields(None).salt("a") != CallerFields(None).salt("a")


def test_a_name_and_a_salt_cannot_be_divided_in_two_ways() -> None:
    fields = CallerFields("key")
    assert fields.salt("ab", "c") != fields.salt("a", "bc")
    assert fields.salt("1", "\x00x") != fields.salt("1\x00", "x")


def test_shared_prefixes_have_one_salt_that_a_callers_own_narrows() -> None:
    fields = CallerFields("key", share_prefixes=True)
    assert fields.salt("a") == fields.salt("b") != CallerFields("key").salt("a")
    assert fields.salt("a", "x") != fields.salt("b", "x")
    assert fields.salt("a", "x") == CallerFields("key").salt("a", "x")


@pytest.mark.parametrize(
    ("may", "asked", "expected"),
    [
        (True, pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_UNSPECIFIED),
        (True, pb.PRIORITY_BATCH, pb.PRIORITY_BATCH),
        (True, pb.PRIORITY_INTERACTIVE, pb.PRIORITY_INTERACTIVE),
        (False, pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_BATCH),
        (False, pb.PRIORITY_INTERACTIVE, pb.PRIORITY_BATCH),
    ],
)
def test_a_caller_gets_the_class_that_it_may_have(
    may: bool, asked: pb.Priority, expected: pb.Priority
) -> None:
    message = pb.GenerateRequest()
    CallerFields("key").write(message, Caller("me", may_be_interactive=may), priority=asked)
    assert (message.caller, message.priority) == ("me", expected)


def test_from_any_other_key_each_of_the_fields_is_refused_by_name() -> None:
    refuse_caller_fields(pb.GenerateRequest(text="x"))
    values = {"caller": "x", "cache_salt": b"x", "priority": pb.PRIORITY_INTERACTIVE}
    for name, value in {**values, "suspect": True}.items():
        with pytest.raises(Forbidden, match=f"^{name} is set by the gateway"):
            refuse_caller_fields(pb.GenerateRequest(**{name: value}))
    assert {*values, "suspect"} == set(NAMES)
