"""Files of rows elsewhere, by URL: s3://, https:// and whatever else fsspec opens.

A file is known by its ETag where the place gives a strong one, which changes with the content; else
by the SHA-256 of its content, for which it is read.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ditty.dataset.datafiles import DataFile, one_format
from ditty.errors import DataError, DittyError, RemoteDenied, RemoteError
from ditty.store.files import sha256_file

CHUNK_BYTES = 8 << 20
TIMEOUTS = {"s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30}}}
"""Seconds; s3fs waits a minute for each of its tries."""

SECRET_PARAMETERS = {"signature", "sig", "token", "access_token", "api_key", "awsaccesskeyid"}
SECRET_PREFIXES = ("x-amz-", "x-goog-")
"""Of a URL's query, in lower case: with them whoever has the URL has what it names."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a file system of fsspec's. `url`: as the user knows it."""

    system: Any
    path: str
    url: str

    @property
    def data_file(self) -> DataFile:
        """Its name, which says its format; there is no such local file."""
        return DataFile(Path(PurePosixPath(urlsplit(self.path).path).name), self.url)

    def etag(self) -> list[Any] | None:
        """What changes with its content: [url, ETag, size]; None where only the content tells."""
        info = self.system.info(self.path)
        tag = info.get("ETag") or info.get("etag")
        if not isinstance(tag, str) or tag.startswith("W/"):  # weak: equal in meaning, not bytes
            return None
        return [self.url, tag.strip('"'), info.get("size")]

    def sha256(self) -> str:
        """Hex digest of its content, which is read."""
        digest = hashlib.sha256()
        with self.system.open(self.path, "rb", block_size=CHUNK_BYTES) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def is_url(source: str) -> bool:
    """Whether a source is the URL of files; `module:function` is none."""
    return "://" in source


def identify(source: str) -> list[Any]:
    """What the files at a URL are, as JSON: a change of content changes it.

    Raises:
        DataError: there is no such file, no such kind of URL, or one with credentials in it.
        RemoteDenied: the place refuses.
        RemoteError: it cannot be reached (retryable).
    """
    with _explained(source):
        return [[file.data_file.kind, *(file.etag() or [file.sha256()])] for file in _find(source)]


def fetch(source: str, folder: Path, known: list[Any] | None) -> list[DataFile]:
    """Copy the files at a URL into a folder.

    Args:
        known: what `identify` said before; None: whatever is there now.
    Raises:
        DataError, RemoteError: as `identify`; or the files are not those of `known` any more.
    """
    fetched, found = [], []
    with _explained(source):
        for number, file in enumerate(_find(source)):
            local = folder / f"{number:05d}-{file.data_file.path.name}"
            file.system.get_file(file.path, str(local))
            file.system.invalidate_cache()  # a pattern's listing is from before the copy
            fetched.append(DataFile(local, file.url))
            identity = (file.etag() or [sha256_file(local)]) if known is not None else []
            found.append([file.data_file.kind, *identity])
    if known is not None and found != known:
        raise DataError(
            f"{source} is not what it was when this run began: run again, with what it is now"
        )
    return fetched


def _find(source: str) -> list[RemoteFile]:
    """The files that a URL, perhaps with `*`, means, by name."""
    import fsspec

    _refuse_credentials(source)
    # A shared instance would answer from its listings, and under credentials of earlier.
    options = {"skip_instance_cache": True, **TIMEOUTS.get(urlsplit(source).scheme, {})}
    system, path = fsspec.core.url_to_fs(source, **options)
    paths = sorted(system.glob(path)) if "*" in path else [path]
    if not paths:
        raise DataError(f"no file matches {source}")
    files = [RemoteFile(system, path, system.unstrip_protocol(path)) for path in paths]
    one_format([file.data_file for file in files], source)
    return files


def _refuse_credentials(source: str) -> None:
    """Raise a DataError, without them, if a URL has a password or a signature in it."""
    parts = urlsplit(source)
    names = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    signed = [n for n in names if n in SECRET_PARAMETERS or n.startswith(SECRET_PREFIXES)]
    if parts.username or parts.password or signed:
        user = "...@" if parts.username or parts.password else ""
        query = f"?{min(signed)}=..." if signed else ""
        raise DataError(
            f"the source {parts.scheme}://{user}{parts.hostname}{parts.path}{query} has "
            "credentials in it, which would be written down with each run: leave them to the "
            "environment, and name an object by s3://bucket/key (gs://, az://)"
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """What fsspec's many kinds of errors mean."""
    try:
        yield
    except DittyError:
        raise
    except (ImportError, ValueError) as error:  # a package to install, or no such protocol
        raise DataError(f"{source} cannot be opened: {error}") from error
    except Exception as error:
        raise _meaning(source, error) from error


def _meaning(source: str, error: Exception) -> DittyError:
    from aiohttp import ClientError

    from ditty.store.s3 import Trouble, classify

    # Over HTTP every failure is a FileNotFoundError at first; what has happened is below it.
    below = error.__cause__
    lost = isinstance(below, ClientError)
    status = getattr(below, "status", None)
    if isinstance(error, FileNotFoundError) and (not lost or status in (404, 410)):
        return DataError(f"there is no file {source}")
    reason = f"{type(error).__name__}: {below if lost else error}"
    denied = isinstance(error, PermissionError) or classify(error) is Trouble.DENIED
    if denied or status in (401, 403):
        return RemoteDenied(
            f"{source} may not be read ({reason}): credentials come from the environment"
        )
    return RemoteError(f"{source} cannot be read: {reason}")
