"""Object stores: checkpoints and adapters that stand in gs://BUCKET/... and s3://BUCKET/...

Tensorstore, by which Orbax reads and writes arrays, reads the small files too, so that nothing more
needs to be installed. Credentials are those of the environment: for Google Cloud a service account
or $GOOGLE_APPLICATION_CREDENTIALS, for Amazon a role, a profile, or $AWS_ACCESS_KEY_ID and
$AWS_SECRET_ACCESS_KEY. $AWS_ENDPOINT_URL names another store that speaks S3, and
$TENSORSTORE_GCS_HTTP_URL another that speaks Google's JSON API.
(google.github.io/tensorstore, "kvstore/gcs" and "kvstore/s3")
"""

import atexit
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore as ts

from mixtral_jax.errors import CheckpointError, UserError

_DRIVERS = {"gs": "gcs", "s3": "s3"}
# A request that fails is repeated for some 15 s; tensorstore would for ten minutes.
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
_BYTES_IN_FLIGHT = 256 << 20  # of files that are being written
# Signs in an answer of a store that the caller may not do this.
_FORBIDDEN = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|AccessDenied|code='40[13]'|[Cc]redential"
)
_CREDENTIALS = {
    "s3": "give a role, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that may do this",
    "gs": "give a service account, or GOOGLE_APPLICATION_CREDENTIALS, that may do this",
}


def is_remote(place: str | Path) -> bool:
    """Returns true for a URL of an object store that can be read."""
    return str(place).startswith(tuple(f"{scheme}://" for scheme in _DRIVERS))


def joined(place: str | Path, name: str) -> str | Path:
    """Returns the place of a file or folder within another one."""
    return f"{str(place).rstrip('/')}/{name}" if is_remote(place) else Path(place) / name


def place_of(folder: str | Path, error_type: type[UserError] = CheckpointError) -> str | Path:
    """Returns a folder as it was given: a URL as a text, any other as a path.

    Raises an error of that type for a URL of another scheme, which would be a folder of this
    machine of a strange name, and for one without a bucket.
    """
    text = str(folder)
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return Path(folder)
    if scheme not in _DRIVERS:
        raise error_type(
            f"{text} is in no store that is known; give gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or "
            "a folder of this machine"
        )
    if not rest.partition("/")[0]:
        raise error_type(f"{text} names no bucket; give {scheme}://BUCKET/FOLDER")
    return text


def spec(place: str | Path) -> dict[str, Any]:
    """Returns tensorstore's spec of all keys below a folder, which is local or a URL.

    Raises CheckpointError for a URL without a bucket.
    """
    if not is_remote(place):
        return {"driver": "file", "path": f"{place}/"}
    scheme, _, rest = str(place).partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise CheckpointError(f"{place} names no bucket; give {scheme}://BUCKET/FOLDER")
    path = path.strip("/")
    store = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return store


def context(**others: Any) -> ts.Context:
    """Returns tensorstore's context for a process that reads stores, with further settings."""
    return ts.Context({"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES, **others})


def reason(place: str | Path, error: ValueError) -> str:
    """Returns why a store could not be read, with the remedy, from an error of tensorstore's."""
    text = str(error)
    scheme = str(place).partition("://")[0]
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return "there is no such bucket; check its name, and the account"
    if _FORBIDDEN.search(text):
        return f"the store refuses it; {_CREDENTIALS[scheme]}"
    return f"the store does not answer as it should ({text.partition(' [')[0][:300]}); try again"


@contextmanager
def refusals_named(
    place: str | Path, error_type: type[UserError] = CheckpointError, verb: str = "read"
) -> Iterator[None]:
    """Turns what tensorstore raises in the block into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise error_type(f"{place} cannot be {verb}: {reason(place, error)}") from error


def fetch(
    place: str,
    folder: Path,
    is_wanted: Callable[[str], bool] = lambda name: True,
    error_type: type[UserError] = CheckpointError,
) -> list[str]:
    """Copies the files that stand directly in a store's folder; returns their names.

    Args:
        place: URL of the folder.
        folder: an existing folder of this machine.
        is_wanted: returns false for names that are not to be copied.
        error_type: of what is raised if the store cannot be read.
    """
    with refusals_named(place, error_type):
        store = ts.KvStore.open(spec(place), context=context()).result()
        # A name with a slash is that of a file in a subfolder, as of the arrays.
        listed = [key.decode() for key in store.list().result()]
        names = [name for name in listed if name and "/" not in name and is_wanted(name)]
        reads = [store.read(name) for name in names]
        for name, read in zip(names, reads, strict=True):
            (folder / name).write_bytes(read.result().value)
    return names


@contextmanager
def uploaded_to(place: str, last: tuple[str, ...]) -> Iterator[Path]:
    """Yields a folder of this machine, whose files are copied to a store when the block has ended.

    A store renames nothing, so what makes a folder a whole one is copied last: a process that is
    killed leaves files that nobody takes for a checkpoint.

    Args:
        place: URL of a folder that has no files.
        last: names of the files that are copied when all others are there.

    Raises FileExistsError if there are files, and CheckpointError if the store refuses.
    """
    store = ts.KvStore.open(spec(place), context=context())
    with refusals_named(place, verb="written"):
        if store.result().list().result():
            raise FileExistsError(f"{place} exists and is not empty; remove it or choose another")
    with tempfile.TemporaryDirectory(prefix="mixtral-jax-") as scratch:
        folder = Path(scratch, place.rstrip("/").rpartition("/")[2])
        folder.mkdir()
        yield folder
        names = sorted(
            str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()
        )
        with refusals_named(place, verb="written"):
            _upload(store.result(), folder, [name for name in names if name not in last])
            _upload(store.result(), folder, [name for name in names if name in last])


def _upload(store: Any, folder: Path, names: list[str]) -> None:
    """Copies files into a store, several at once."""
    pending: deque[tuple[int, Any]] = deque()
    num_bytes = 0
    for name in names:
        content = (folder / name).read_bytes()
        while pending and num_bytes + len(content) > _BYTES_IN_FLIGHT:
            size, write = pending.popleft()
            write.result()
            num_bytes -= size
        num_bytes += len(content)
        pending.append((len(content), store.write(name, content)))
    for _, write in pending:
        write.result()


def scratch_folder() -> Path:
    """Makes a folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mixtral-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def local_copy(
    place: str | Path, is_wanted: Callable[[str], bool], error_type: type[UserError]
) -> Iterator[Path]:
    """Yields a folder of this machine: the given one, or a copy of a store's until the block ends.

    A UserError that is raised in the block names the store's folder in place of the copy.
    """
    place = place_of(place, error_type)
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="mixtral-jax-") as scratch:
        fetch(place, Path(scratch), is_wanted, error_type)
        with renamed(Path(scratch), place):
            yield Path(scratch)


@contextmanager
def renamed(folder: Path, place: str) -> Iterator[None]:
    """Names `place` instead of a folder in the texts of the UserErrors of the block."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace(str(folder), place.rstrip("/"))) from error
