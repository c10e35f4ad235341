from mixtral_jax.structure.cache import FormCache


def test_a_caller_finds_its_own_entries_alone() -> None:
    cache: FormCache[str] = FormCache(100)
    cache.put(b"a", b"key", "of a", 10)
    assert cache.get(b"a", b"key") == "of a"
    assert cache.get(b"b", b"key") is None
    cache.put(b"a", b"key", "new", 20)
    assert (cache.get(b"a", b"key"), cache.size) == ("new", 20)


def test_the_caller_that_holds_the_most_loses_its_oldest() -> None:
    cache: FormCache[int] = FormCache(100)
    cache.put(b"small", b"0", 0, 10)
    for i in range(20):
        cache.put(b"large", bytes([i]), i, 30)
        if i == 3:
            cache.get(b"large", bytes([2]))
    assert cache.size == 100
    assert cache.get(b"small", b"0") == 0
    assert [i for i in range(20) if cache.get(b"large", bytes([i])) is not None] == [17, 18, 19]


def test_the_least_recently_used_goes_first() -> None:
    cache: FormCache[int] = FormCache(3)
    for i in range(3):
        cache.put(b"", bytes([i]), i, 1)
    cache.get(b"", bytes([0]))
    cache.put(b"", bytes([3]), 3, 1)
    assert [i for i in range(4) if cache.get(b"", bytes([i])) is not None] == [0, 2, 3]


def test_an_entry_beyond_all_bytes_is_not_kept() -> None:
    cache: FormCache[int] = FormCache(10)
    cache.put(b"", b"a", 1, 5)
    cache.put(b"", b"a", 2, 11)
    assert cache.get(b"", b"a") is None
    assert cache.size == 0
