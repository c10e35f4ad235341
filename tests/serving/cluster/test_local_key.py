"""The key of a group on one machine: made once, the same for all, for its user alone."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.cluster.local_key import local_key
from serving.cluster.rank import RankError


def test_processes_that_start_together_get_one_key(tmp_path: Path) -> None:
    file = tmp_path / "state" / "group.key"
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(local_key, [file] * 32))
    (key,) = keys
    assert len(key) == 32 and local_key(file) == key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "group.key"
    local_key(file)
    file.chmod(0o640)
    with pytest.raises(RankError, match="group.key: others may read it; run chmod 600"):
        local_key(file)


def test_where_nothing_can_be_kept_the_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RankError, match="set MIXTRAL_JAX_GROUP_KEY to the same key"):
        local_key(tmp_path / "file" / "group.key")
