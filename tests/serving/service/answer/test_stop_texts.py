"""Stop texts, with pieces worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.service.answer.stop_texts import StopTexts


def pushed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    texts = StopTexts(stops)
    out = [texts.push(piece) for piece in pieces]
    return [*out, texts.finish()], texts.stopped


def test_the_example_of_the_class() -> None:
    pieces = ["a E", "N", "X EN", "D b"]
    assert pushed(["END"], pieces) == (["a ", "", "ENX ", "", ""], True)


def test_without_stops_everything_passes_at_once() -> None:
    assert pushed([], ["a", "b"]) == (["a", "b", ""], False)


def test_what_was_held_comes_out_at_the_end() -> None:
    assert pushed(["END"], ["x EN"]) == (["x ", "EN"], False)


def test_the_earliest_of_several_stops_wins() -> None:
    assert pushed(["b", "ab"], ["xab"]) == (["x", ""], True)


def test_an_included_stop_is_the_end_of_the_text() -> None:
    texts = StopTexts(["END"], included=True)
    assert [texts.push(piece) for piece in ["a E", "ND b"]] == ["a ", "END"]
    assert texts.found == "END"


def test_of_stops_at_one_place_the_first_of_the_list_is_meant() -> None:
    texts = StopTexts(["ab", "a"], included=True)
    assert texts.push("xab") == "xab" and texts.found == "ab"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopTexts([""])


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_cut_anywhere_the_result_is_the_same(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    out, stopped = pushed(stops, pieces)
    # A stop text that is certain earlier in the stream may begin later than another one.
    assert stopped == bool(ends)
    assert whole.startswith("".join(out))
    if not stopped:
        assert "".join(out) == whole
    elif len(stops) == 1:
        assert "".join(out) == whole[: ends[0]]
    assert not any(stop in "".join(out) for stop in stops)
