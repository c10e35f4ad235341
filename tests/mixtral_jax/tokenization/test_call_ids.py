"""Ids of calls become nine letters and digits, one for each."""

from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.tokenization import call_ids
from mixtral_jax.tokenization.call_ids import CallIds, new_call_id


def test_ids_of_the_right_form_stay() -> None:
    ids = CallIds()
    assert ids.map("abcDEF123") == "abcDEF123"
    other = ids.map("call_1")
    assert len(other) == 9
    assert other.isalnum()
    assert ids.map("call_1") == other == CallIds().map("call_1")


def test_an_id_that_another_one_became_gets_a_new_one() -> None:
    became = CallIds().map("call_1")
    ids = CallIds()
    assert ids.map("call_1") == became
    assert ids.map(became) != became
    ids = CallIds()
    assert ids.map(became) == became
    assert ids.map("call_1") != became


@given(st.lists(st.text(max_size=12), unique=True))
def test_no_two_ids_become_the_same(given_ids: list[str]) -> None:
    ids = CallIds()
    mapped = [ids.map(call_id) for call_id in given_ids]
    assert len(set(mapped)) == len(given_ids)
    assert all(len(call_id) == 9 and call_id.isascii() for call_id in mapped)
    assert mapped == [ids.map(call_id) for call_id in given_ids]


def test_new_ids_have_the_right_form() -> None:
    made = {new_call_id() for _ in range(100)}
    assert len(made) == 100
    assert all(len(call_id) == call_ids.ID_LENGTH and call_id.isalnum() for call_id in made)
