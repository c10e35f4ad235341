"""Who holds which page of the cache, and which pages are worth keeping: in plain Python.

A page holds the keys and values of `page_size` tokens. `PagePool` counts how many sequences hold
each page; `PageTable` is the row of pages of one sequence.

Prefix reuse: what stands in a page follows from its tokens and all tokens before them. So a full
page is registered under its tokens and the chain of the page before it. A chain is a number that
the pool gives to one registered page and never to another: two pages have the same key only if all
their tokens up to there are the same, and nothing is left to the luck of a hash.

    free ──allocate──> held ──release──> free          a page that was never registered
                       held ──release──> cached        a registered one: its content stays, and
    cached ──match──> held                             it can be had again by its tokens,
    cached ──allocate──> held                          or, where no other is free, is overwritten

Worked example: page size 2, sequence A has the tokens [5 6 7 8 9]. Its pages 0 and 1 are full:

    register(0, ROOT, (5, 6)) -> chain 1
    register(1, 1, (7, 8))    -> chain 2       under the key (1, (7, 8))

When A ends, its page 2 is free and pages 1 and 0 are cached, in this order: page 1 is of no use
without page 0, so it is overwritten first. A later [5 6 7 8 1] finds both: match() -> [0 1] [1 2].
"""

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the chain before a sequence's first page


class PagePool:
    """Counts the holders of `num_pages` pages, and knows full pages by what stands in them.

    With `reuse` false nothing is kept and nothing is found.
    """

    def __init__(self, num_pages: int, page_size: int, reuse: bool = True) -> None:
        self.page_size = page_size
        self._reuse = reuse
        self._holders = [0] * num_pages
        self._free = list(range(num_pages))[::-1]  # taken from the end: page 0 first
        self._cached = OrderedDict[int, None]()  # held by nobody but registered; oldest first
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # of the registered pages
        self._found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> page, chain
        self._last_chain = ROOT

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, the cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that can still be found."""
        return len(self._cached)

    def allocate(self) -> int:
        """A page to be written, held once. Costs the page longest unused if no other is free."""
        assert self.num_free, "ask num_free first"
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._found[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Holds a page once more."""
        self._cached.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Holds a page once less."""
        assert self._holders[page] > 0, f"page {page} is held by nobody"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._keys:
                self._cached[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, parent: int, tokens: tuple[int, ...]) -> int:
        """Makes a full, computed page known; returns its chain.

        If an equal page is known already, that one stays, and `page` is free when it is released.
        """
        if not self._reuse:
            return ROOT
        key = parent, tokens
        if key not in self._found:
            self._last_chain += 1
            self._found[key] = page, self._last_chain
            self._keys[page] = key
        return self._found[key][1]

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """The longest known row of full pages that `tokens` begin with, and the chains of each.

        Holds these pages once more.
        """
        pages, chains = list[int](), list[int]()
        chain = ROOT
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            found = self._found.get((chain, tuple(tokens[end - self.page_size : end])))
            if found is None:
                break
            page, chain = found
            self.share(page)
            pages.append(page)
            chains.append(chain)
        return pages, chains


class PageTable:
    """The pages of one sequence, in order of its tokens: it grows, its window slides, it ends."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []  # 0 where one has left the window
        self._left = 0  # so many have left the window
        self._chains: list[int] = []  # of the pages that are registered
        self._copy: tuple[int, int] | None = None  # owed to a fork; its source is held
        self._row: tuple[int, ...] | None = None  # _pages as a tuple, until they change

    @property
    def reach(self) -> int:
        """Tokens that the sequence could have, were it given all free pages."""
        return (len(self._pages) + self._pool.num_free) * self._pool.page_size

    def lacking(self, end: int) -> int:
        """How many pages `grow(end)` takes from the pool."""
        return max(0, -(-end // self._pool.page_size) - len(self._pages))

    def grow(self, end: int) -> None:
        """Makes room for the tokens before position `end`."""
        if lacking := self.lacking(end):
            self._pages.extend(self._pool.allocate() for _ in range(lacking))
            self._row = None

    def covering(self, end: int) -> tuple[int, ...]:
        """The pages of the tokens before position `end`; 0 for those that have left the window."""
        if self._row is None:
            self._row = tuple(self._pages)
        count = -(-end // self._pool.page_size)
        return self._row if count == len(self._row) else self._row[:count]

    def find(self, tokens: Sequence[int]) -> int:
        """Starts an empty table with the known pages of a prefix; returns how many tokens that is.

        Finds whole pages, and never all of `tokens`: the last one is to be computed, as what
        follows it is drawn from that.
        """
        assert not self._pages
        self._pages, self._chains = self._pool.match(tokens[:-1])
        self._row = None
        return len(self._pages) * self._pool.page_size

    def register(self, tokens: Sequence[int], computed: int) -> None:
        """Makes known the pages that are full with the first `computed` tokens."""
        size = self._pool.page_size
        for i in range(len(self._chains), computed // size):
            parent = self._chains[-1] if self._chains else ROOT
            content = tuple(tokens[i * size : (i + 1) * size])
            self._chains.append(self._pool.register(self._pages[i], parent, content))

    def slide(self, visible: int) -> None:
        """Gives back the pages that end before position `visible`, the first one still seen."""
        for i in range(self._left, min(visible // self._pool.page_size, len(self._pages))):
            self._pool.release(self._pages[i])
            self._pages[i] = 0
            self._left = i + 1
            self._row = None

    def fork(self, end: int) -> "PageTable":
        """A table for another sequence with the same tokens before position `end`.

        Pages that are full before `end` are shared. The page of position `end` is a new one, as
        both sequences write it; `settle` tells what is to be copied to it. Takes one page.
        """
        twin = PageTable(self._pool)
        full, part = divmod(end, self._pool.page_size)
        for page in self._pages[self._left : full]:
            self._pool.share(page)
        twin._pages = [*self._pages[:full], self._pool.allocate()]
        twin._left, twin._chains = self._left, self._chains[:full]
        if part:
            # Held, so that it is neither written by a next holder nor copied onto by another fork
            # in the step that makes this copy.
            twin._copy = self._pages[full], twin._pages[full]
            self._pool.share(self._pages[full])
        return twin

    def settle(self) -> tuple[int, int] | None:
        """The copy (source, destination) that the next step owes to a fork; told once."""
        copy, self._copy = self._copy, None
        if copy is not None:
            self._pool.release(copy[0])
        return copy

    def release(self) -> None:
        """Gives back all pages, the last first, so that a chain is overwritten from its end."""
        self.settle()
        for page in reversed(self._pages[self._left :]):
            self._pool.release(page)
        self._pages, self._chains = [], []
        self._left, self._row = 0, None
