"""Pages worked out by hand: page size 2, so that a chain is long with few tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.scheduling.pages import PagePool, PageTable


def table(pool: PagePool, tokens: list[int]) -> PageTable:
    """A sequence's pages as they are when all its tokens are computed."""
    one = PageTable(pool)
    one.find(tokens)
    one.grow(len(tokens))
    one.register(tokens, len(tokens))
    return one


def found(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages that these tokens find, and that are held after that."""
    return pool.match(tokens)[0]


def test_the_example_of_the_module() -> None:
    pool = PagePool(num_pages=8, page_size=2)
    a = table(pool, [5, 6, 7, 8, 9])
    assert a.covering(5) == (0, 1, 2)
    a.release()
    assert (pool.num_free, pool.num_cached) == (8, 2)
    assert pool.match([5, 6, 7, 8, 1]) == ([0, 1], [1, 2])
    assert (pool.num_free, pool.num_cached) == (6, 0)


def test_the_same_page_behind_another_is_another_page() -> None:
    pool = PagePool(num_pages=8, page_size=2)
    table(pool, [1, 2, 3, 4])
    table(pool, [9, 9, 3, 4])
    assert found(pool, [1, 2, 3, 4]) == [0, 1]
    assert found(pool, [9, 9, 3, 4]) == [2, 3]
    assert found(pool, [3, 4]) == []


def test_the_page_longest_unused_goes_first_and_a_chain_from_its_end() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    table(pool, [1, 2, 3, 4]).release()  # pages 0 and 1
    table(pool, [5, 6, 7, 8]).release()  # pages 2 and 3
    a = PageTable(pool)
    assert a.find([1, 2, 9]) == 2
    a.release()  # page 0 is the one used last
    assert [pool.allocate() for _ in range(4)] == [1, 3, 2, 0]


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = PagePool(num_pages=3, page_size=2)
    table(pool, [1, 2]).release()
    pool.allocate(), pool.allocate()
    assert found(pool, [1, 2]) == [0]


def test_of_two_equal_pages_the_first_is_known() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    a, b = PageTable(pool), PageTable(pool)
    for one in (a, b):  # both begin before either is computed
        one.grow(4)
        one.register([1, 2, 3, 4], 4)
    b.release()
    assert pool.num_cached == 0
    assert found(pool, [1, 2, 3, 4]) == list(a.covering(4))


def test_an_equal_page_behind_an_equal_page_is_found() -> None:
    """B's second page goes on from A's first, though B holds a page of its own with the same."""
    pool = PagePool(num_pages=4, page_size=2)
    a, b = PageTable(pool), PageTable(pool)
    for one, tokens in ((a, [1, 2]), (b, [1, 2, 3, 4])):
        one.grow(len(tokens))
        one.register(tokens, len(tokens))
    assert (a.covering(2), b.covering(4)) == ((0,), (1, 2))
    assert found(pool, [1, 2, 3, 4]) == [0, 2]


def test_the_last_token_is_never_found() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    table(pool, [1, 2, 3, 4]).release()
    assert PageTable(pool).find([1, 2, 3, 4]) == 2


def test_without_reuse_nothing_is_kept() -> None:
    pool = PagePool(num_pages=4, page_size=2, reuse=False)
    table(pool, [1, 2, 3, 4]).release()
    assert (pool.num_free, pool.num_cached) == (4, 0)
    assert PageTable(pool).find([1, 2, 3, 4, 5]) == 0


def test_a_window_gives_back_whole_pages() -> None:
    pool = PagePool(num_pages=4, page_size=2, reuse=False)
    a = table(pool, [1, 2, 3, 4, 5, 6])
    a.slide(3)  # position 2 is unseen, but shares its page with 3
    assert (a.covering(6), pool.num_free) == ((0, 1, 2), 2)
    a.slide(4)
    assert (a.covering(6), pool.num_free) == ((0, 0, 2), 3)
    assert a.reach == 12  # 4 tokens that have left, 2 in a page, 6 in free ones
    a.release()
    assert pool.num_free == 4


@pytest.mark.parametrize(
    ("end", "pages", "copy"),
    [
        (4, (0, 1, 3), None),  # the next token begins a page
        (5, (0, 1, 3), (2, 3)),
        (1, (3,), (0, 3)),
    ],
)
def test_a_fork_shares_full_pages_and_copies_the_last(
    end: int, pages: tuple[int, ...], copy: tuple[int, int] | None
) -> None:
    pool = PagePool(num_pages=5, page_size=2)
    a = table(pool, [1, 2, 3, 4, 5, 6])
    b = a.fork(end)
    assert b.covering(end + 1) == pages
    a.release()  # the source of the copy is not free until the copy is on its way
    assert pool.num_free == 5 - len(pages) - (copy is not None)
    assert b.settle() == copy
    assert b.settle() is None
    b.release()
    assert pool.num_free == 5


def test_a_fork_that_never_ran_gives_back_its_source() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    a = table(pool, [1, 2, 3])
    b = a.fork(2 + 1)
    a.release()
    b.release()
    assert pool.num_free == 4


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.booleans())))
def test_what_is_found_is_what_was_asked(rows: list[tuple[list[int], bool]]) -> None:
    """A page that is found was written, since it was last handed out, with just these tokens."""
    pool = PagePool(num_pages=12, page_size=2)
    content: dict[int, list[int]] = {}  # page -> all tokens up to its end
    held: list[PageTable] = []
    for tokens, stays in rows:
        while sum(len(one.covering(99)) for one in held) > 6:
            held.pop(0).release()
        one = PageTable(pool)
        reused = one.find(tokens) // 2
        one.grow(len(tokens))
        for i, page in enumerate(one.covering(len(tokens))):
            if i < reused:
                assert content[page] == tokens[: 2 * i + 2]
            content[page] = tokens[: 2 * i + 2]
        one.register(tokens, len(tokens))
        held.append(one)
        if not stays:
            held.pop().release()
    for one in held:
        one.release()
    assert pool.num_free == 12
