"""Pages of the cache: the sequences that hold them, and the pages that are kept for reuse.

A page holds the keys and values of `page_size` tokens. `PagePool` counts how many sequences hold
each page; `PageTable` is the row of pages of one sequence.

Prefix reuse: the content of a page follows from its tokens and all tokens before them. So a full
page is registered under its tokens and the chain of the page before it. A chain is a number that
the pool gives to one registered page and never to another: two pages have the same key only if all
their tokens up to there are the same, which a hash could not promise.

Salts: before a sequence's first page stands the salt of its request in place of a chain, so that
pages are found under the same salt only. A salt is remembered in the keys of registered pages and
nowhere else: when its last page is overwritten, nothing of it is left.

    free ──allocate──> held ──release──> free          a page that was never registered
                       held ──release──> cached        a registered page keeps its content,
    cached ──match──> held                             is found again by its tokens,
    cached ──allocate──> held                          or is overwritten if no other page is free

Worked example: page size 2, sequence A has the tokens [5 6 7 8 9]. Its pages 0 and 1 are full:

    register(0, b"", (5, 6)) -> chain 1        under the key (b"", (5, 6)): A has no salt
    register(1, 1, (7, 8))   -> chain 2        under the key (1, (7, 8))

When A ends, its page 2 is free and pages 1 and 0 are cached, in this order: page 1 is useless
without page 0, so it is overwritten first. A later [5 6 7 8 1] finds both: match() -> [0 1] [1 2].
With the salt b"x" it finds none.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Chain = int | bytes  # of a registered page; the salt before a sequence's first page
_Key = tuple[Chain, tuple[int, ...]]
_NO_CHAIN = 0  # of every page without reuse


class PagePool:
    """Counts the holders of pages, and finds full pages by their tokens.

    Args:
        num_pages: number of pages.
        page_size: tokens of a page.
        reuse: keeps full pages to be found again; without it no page is ever found.
    """

    def __init__(self, num_pages: int, page_size: int, reuse: bool = True) -> None:
        self.page_size = page_size
        self._reuse = reuse
        self._holders = [0] * num_pages
        self._free = list(range(num_pages))[::-1]  # taken from the end: page 0 first
        self._cached = OrderedDict[int, None]()  # held by nobody but registered; oldest first
        self._keys: dict[int, _Key] = {}  # of the registered pages
        self._registered: dict[_Key, tuple[int, int]] = {}  # page, chain
        self._last_chain = _NO_CHAIN

    @property
    def num_free(self) -> int:
        """Number of pages that no sequence holds, the cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Number of pages that no sequence holds and that can still be found."""
        return len(self._cached)

    def allocate(self) -> int:
        """Returns a page to be written, held once.

        If no other page is free, this is the cached page that was unused for the longest.
        """
        assert self.num_free, "ask num_free first"
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._registered[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Counts one holder more."""
        self._cached.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Counts one holder less; without any, the page is free or cached."""
        assert self._holders[page] > 0, f"page {page} has no holder"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._keys:
                self._cached[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, parent: Chain, tokens: tuple[int, ...]) -> int:
        """Registers a full, computed page under its tokens and returns its chain.

        `parent` is the chain of the page before it, the salt for the first one. If an
        equal page is registered already, that page stays so, and `page` is free when it is
        released.
        """
        if not self._reuse:
            return _NO_CHAIN
        key = parent, tokens
        if key not in self._registered:
            self._last_chain += 1
            self._registered[key] = page, self._last_chain
            self._keys[page] = key
        return self._registered[key][1]

    def lookup(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[list[int], list[int]]:
        """Returns the registered pages that `tokens` begin with, and the chain of each.

        They are not held by that, and count as unused as before.
        """
        pages, chains = list[int](), list[int]()
        chain: Chain = salt
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            entry = self._registered.get((chain, tuple(tokens[end - self.page_size : end])))
            if entry is None:
                break
            page, chain = entry
            pages.append(page)
            chains.append(chain)
        return pages, chains

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[list[int], list[int]]:
        """Returns what `lookup` does, each page held once more."""
        pages, chains = self.lookup(tokens, salt)
        for page in pages:
            self.share(page)
        return pages, chains

    def num_unheld(self, pages: Iterable[int]) -> int:
        """Returns how many of these pages no sequence holds."""
        return sum(self._holders[page] == 0 for page in pages)

    def num_freed(self, tables: Iterable["PageTable"], kept: Iterable[int]) -> int:
        """Returns the number of pages that are free once all these tables are released.

        Those in `kept` are not counted, because somebody holds them again at once.
        """
        held = Counter(page for table in tables for page in table.held)
        for page in kept:
            held.pop(page, None)
        return sum(self._holders[page] == count for page, count in held.items())

    def forget(self) -> None:
        """Registers no page any more, because their contents are lost."""
        self._free += self._cached
        self._cached.clear()
        self._keys.clear()
        self._registered.clear()


class PageTable:
    """Pages of one sequence, in order of its tokens.

    Args:
        pool: owns the pages.
        salt: pages of a prefix are found, and can be found later, under the same salt only.
    """

    def __init__(self, pool: PagePool, salt: bytes = b"") -> None:
        self._pool = pool
        self._salt = salt
        self._pages: list[int] = []  # 0 for pages before the window
        self._num_dropped = 0  # pages before the window
        self._chains: list[int] = []  # of the pages that are registered
        self._copy: tuple[int, int] | None = None  # of a fork's first page; its source is held
        self._row: tuple[int, ...] | None = None  # _pages as a tuple, until they change

    @property
    def held(self) -> list[int]:
        """Pages that it holds, the source of a copy that is still to be made among them."""
        pages = self._pages[self._num_dropped :]
        return pages if self._copy is None else [*pages, self._copy[0]]

    @property
    def reach(self) -> int:
        """Number of tokens that the sequence could have if it got all free pages."""
        return (len(self._pages) + self._pool.num_free) * self._pool.page_size

    def lacking(self, end: int) -> int:
        """Returns the number of pages that `grow(end)` takes from the pool."""
        return max(0, -(-end // self._pool.page_size) - len(self._pages))

    def grow(self, end: int) -> None:
        """Takes pages from the pool until there is room for the tokens before position `end`."""
        if lacking := self.lacking(end):
            self._pages.extend(self._pool.allocate() for _ in range(lacking))
            self._row = None

    def covering(self, end: int) -> tuple[int, ...]:
        """Returns the pages of the tokens before position `end`; 0 for those before the window."""
        if self._row is None:
            self._row = tuple(self._pages)
        count = -(-end // self._pool.page_size)
        return self._row if count == len(self._row) else self._row[:count]

    def lookup(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the registered pages of a prefix of `tokens`, and their chains; holds none.

        Only whole pages are found, and never all of `tokens`: the last token must be computed,
        because the next one is drawn from its result.
        """
        return self._pool.lookup(tokens[:-1], self._salt)

    def start(self, pages: list[int], chains: list[int]) -> None:
        """Starts an empty table with what `lookup` returned just now."""
        assert not self._pages
        for page in pages:
            self._pool.share(page)
        self._pages, self._chains, self._row = pages, chains, None

    def find(self, tokens: Sequence[int]) -> int:
        """Starts an empty table with the pages of a prefix; returns the number of their tokens."""
        self.start(*self.lookup(tokens))
        return len(self._pages) * self._pool.page_size

    def register(self, tokens: Sequence[int], computed: int) -> None:
        """Registers the pages that are full with the first `computed` tokens."""
        size = self._pool.page_size
        for i in range(len(self._chains), computed // size):
            parent = self._chains[-1] if self._chains else self._salt
            content = tuple(tokens[i * size : (i + 1) * size])
            self._chains.append(self._pool.register(self._pages[i], parent, content))

    def slide(self, visible: int) -> None:
        """Gives back the pages that end before position `visible`, the first that is still seen."""
        for i in range(self._num_dropped, min(visible // self._pool.page_size, len(self._pages))):
            self._pool.release(self._pages[i])
            self._pages[i] = 0
            self._num_dropped = i + 1
            self._row = None

    def fork(self, end: int) -> "PageTable":
        """Returns a table for another sequence with the same tokens before position `end`.

        Pages that are full before `end` are shared. The page of position `end` is a new one,
        because both sequences write it; `settle` returns the copy that fills it. Takes one page.
        """
        twin = PageTable(self._pool, self._salt)
        full, remainder = divmod(end, self._pool.page_size)
        for page in self._pages[self._num_dropped : full]:
            self._pool.share(page)
        twin._pages = [*self._pages[:full], self._pool.allocate()]
        twin._num_dropped, twin._chains = self._num_dropped, self._chains[:full]
        if remainder:
            # The source is held, so that in the step that makes this copy it is neither written by
            # a next holder nor the destination of another fork's copy.
            twin._copy = self._pages[full], twin._pages[full]
            self._pool.share(self._pages[full])
        return twin

    def settle(self) -> tuple[int, int] | None:
        """Returns, once, the copy (source, destination) that the next step must make for a fork."""
        copy, self._copy = self._copy, None
        if copy is not None:
            self._pool.release(copy[0])
        return copy

    def release(self) -> None:
        """Gives back all pages, the last one first, so that a chain is overwritten from its end."""
        self.settle()
        for page in reversed(self._pages[self._num_dropped :]):
            self._pool.release(page)
        self._pages, self._chains = [], []
        self._num_dropped, self._row = 0, None
