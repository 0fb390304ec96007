"""Objects in an S3 bucket: s3fs with bounds around it, and its errors told apart.

What s3fs does by itself, measured, and what is done about it here: a PUT can wait for ever for
`100 Continue` (a total time limit a request); listings and `exists` answer from a cache or say
False for a dead server (neither is used); an exclusive multipart upload lets several writers win
(only small objects are created); errors come as a dozen unrelated classes (`classify`).
Endpoint, region and credentials are found by botocore: environment, config file, or role.
"""

import base64
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

from ditty.errors import DittyError, RemoteDenied, RemoteError, SpecError, StoreError, scrub
from ditty.failpoints import fail_point
from ditty.store.files import sha256_bytes
from ditty.store.objects import permanent

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")

PART_BYTES = 16 << 20  # with 4 parts in flight an upload peaks below 200 MB; s3fs's default: 1 GB
PARTS_IN_FLIGHT = 4
CONNECT_S, SILENCE_S = 5, 30  # to connect, and between two packets
READ_BACK_BYTES = 1 << 20  # objects up to this size are compared by content, larger by checksum

_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN for temporary ones), "
    "AWS_PROFILE, or use a role that may list, read, write and delete there"
)


@dataclass(frozen=True)
class Patience:
    """How long one operation on one object may meet faults before it is given up.

    The clock starts at the first fault, so that a long upload has its second chance too.

    Attributes:
        attempts: tries of an operation, the first included.
        first_wait_s: seconds between the first two; doubled each time, then jittered down.
        longest_wait_s: seconds between two tries at most.
        total_s: seconds after the first fault in which another try may start.
        request_s: seconds that one HTTP request may last, body included. A request moves at most
            2 x PART_BYTES and shares the line with PARTS_IN_FLIGHT others.
    """

    attempts: int = 10
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0
    total_s: float = 60.0
    request_s: float = 120.0

    def waits(self) -> Iterator[float]:
        """Seconds to wait after each failed try; ends where the next failure is final.

        Jitter keeps many machines from coming back in step after an outage.
        """
        end = time.monotonic() + self.total_s
        for attempt in range(self.attempts - 1):
            wait = min(self.longest_wait_s, self.first_wait_s * 2**attempt)
            wait *= random.uniform(0.5, 1.0)
            if time.monotonic() + wait >= end:
                return
            yield wait


class Trouble(Enum):
    """What an exception out of s3fs means."""

    TRANSIENT = auto()  # the same request may succeed later
    ABSENT = auto()  # the server said that there is no such object
    TAKEN = auto()  # an exclusive create found an object
    DENIED = auto()  # credentials missing, wrong, expired or too weak
    NO_BUCKET = auto()
    REFUSED = auto()  # any other answer that will not change
    UPLOAD_GONE = auto()  # someone aborted this multipart upload, or its end was never heard of
    LOCAL = auto()  # this machine's disk


# Codes whose HTTP status (400, 404, 409, 412) does not tell enough; the other codes follow theirs.
_BY_CODE = {
    Trouble.TRANSIENT: "RequestTimeout OperationAborted ConditionalRequestConflict BadDigest "
    "IncompleteBody XAmzContentSHA256Mismatch Throttling ThrottlingException RequestThrottled",
    Trouble.DENIED: "ExpiredToken ExpiredTokenException InvalidToken TokenRefreshRequired",
    Trouble.ABSENT: "NoSuchKey 404",
    Trouble.TAKEN: "PreconditionFailed",
    Trouble.NO_BUCKET: "NoSuchBucket",
    Trouble.UPLOAD_GONE: "NoSuchUpload",
}
_WORTH_A_TRY = {Trouble.TRANSIENT, Trouble.UPLOAD_GONE}
_CODES = {code: trouble for trouble, codes in _BY_CODE.items() for code in codes.split()}
_STATUSES = {
    401: Trouble.DENIED,
    403: Trouble.DENIED,
    408: Trouble.TRANSIENT,
    412: Trouble.TAKEN,
    429: Trouble.TRANSIENT,
}


def classify(error: BaseException) -> Trouble | None:
    """What `error`, raised by an s3fs call, means; None: a bug, not an answer.

    s3fs turns the server's answers into OSErrors whose cause is botocore's ClientError, and lets
    connection faults through as classes of botocore and aiohttp that are no OSErrors.
    """
    import aiohttp
    import botocore.exceptions as boto
    from botocore.parsers import ResponseParserError

    answer = error.__cause__ or error
    if isinstance(answer, boto.ClientError):
        return _classify_answer(answer.response)
    lost_at_boto = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)
    damaged = (boto.FlexibleChecksumError, ResponseParserError)
    lost_below = (aiohttp.ClientError, TimeoutError, ConnectionError)
    no_keys = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)
    no_role = (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError)
    if isinstance(error, lost_at_boto + damaged + lost_below):
        return Trouble.TRANSIENT
    if isinstance(error, no_keys + no_role):
        return Trouble.DENIED
    if isinstance(error, boto.BotoCoreError | RecursionError):  # botocore follows 301s for ever
        return Trouble.REFUSED
    return Trouble.LOCAL if isinstance(error, OSError) else None


def _classify_answer(response: dict[str, Any]) -> Trouble:
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _CODES:
        return _CODES[code]
    if status in _STATUSES:
        return _STATUSES[status]
    # 501 says that the server does not know the request: it will not learn.
    return Trouble.TRANSIENT if status >= 500 and status != 501 else Trouble.REFUSED


class Bucket:
    """Objects in `bucket` below `prefix`."""

    def __init__(self, bucket: str, prefix: str, patience: Patience):
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.patience = patience
        self._fs: Any = None

    def prepare(self) -> None:
        """Nothing: a bucket is made by a person, who decides its region and who may read it."""

    def read(self, key: str) -> bytes | None:
        """The bytes of an object, or None where the server says that there is none."""
        return self._try(f"read {key}", lambda fs: self._body(fs, key), {Trouble.ABSENT: None})

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object that does not exist yet; False: one is there.

        After a lost reply the repeated request finds the object of the first: False then means
        "read it and compare".
        """
        assert len(data) < PART_BYTES, "an exclusive multipart upload is not exclusive"
        path = self._path(key)
        fail_point("create", key)
        created = self._try(
            f"create {key}",
            lambda fs: fs.pipe_file(path, data, mode="create"),
            {Trouble.TAKEN: Trouble.TAKEN},
        )
        return created is not Trouble.TAKEN

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Copy a local file to `key`; objects appear whole or not at all.

        A small one is sent with its SHA-256, which the server checks; the parts of a larger one
        with botocore's CRC32 each.
        """
        extra: dict[str, Any] = {"Metadata": {"sha256": sha256}}
        if path.stat().st_size < 2 * PART_BYTES:  # one request
            extra["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(sha256)).decode()
        fail_point("put", key)
        self._try(
            f"write {key}",
            lambda fs: fs.put_file(
                str(path),
                self._path(key),
                chunksize=PART_BYTES,
                max_concurrency=PARTS_IN_FLIGHT,
                **extra,
            ),
        )

    def holds(self, key: str, size: int, sha256: str) -> bool:
        """Compare size and recorded SHA-256, and for a small object its content too."""
        where = {"Bucket": self.bucket, "Key": self.prefix + key}
        head = self._try(
            f"look at {key}",
            lambda fs: fs.call_s3("head_object", **where, ChecksumMode="ENABLED"),
            {Trouble.ABSENT: None},
        )
        if head is None or head["ContentLength"] != size:
            return False
        if head.get("Metadata", {}).get("sha256") != sha256:
            return False
        if size > READ_BACK_BYTES:
            stored = head.get("ChecksumSHA256")
            return stored is None or base64.b64decode(stored).hex() == sha256
        body = self.read(key)
        return body is not None and sha256_bytes(body) == sha256

    def download(self, key: str, path: Path) -> bool:
        """Copy an object to `path`; s3fs lets flipped bits and mixed versions through."""
        fail_point("get", path)
        got = self._try(
            f"read {key}",
            lambda fs: fs.get_file(
                self._path(key), str(path), chunksize=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
            ),
            {Trouble.ABSENT: Trouble.ABSENT},
        )
        return got is not Trouble.ABSENT

    def keys(self, prefix: str) -> list[str]:
        """List by ListObjectsV2 itself, page by page."""
        pages = self._pages("list_objects_v2", ("ContinuationToken",), prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(key.removeprefix(self.prefix) for key in found)

    def delete(self, key: str) -> None:
        """Remove an object; S3 says nothing of one that is absent."""
        where = {"Bucket": self.bucket, "Key": self.prefix + key}
        fail_point("delete", key)
        self._try(
            f"delete {key}",
            lambda fs: fs.call_s3("delete_object", **where),
            {Trouble.ABSENT: None},
        )

    def clear_debris(self, prefix: str) -> None:
        """Abort the multipart uploads that killed writers left below `prefix`, and only there.

        They cost money and show in no listing.
        """
        for upload in self._uploads(prefix):
            self._abort(upload["Key"], upload["UploadId"])

    def debris(self, prefix: str) -> list[str]:
        """Keys of the multipart uploads below `prefix`."""
        return sorted(u["Key"].removeprefix(self.prefix) for u in self._uploads(prefix))

    def _uploads(self, prefix: str) -> Iterator[dict[str, Any]]:
        markers = ("KeyMarker", "UploadIdMarker")
        for page in self._pages("list_multipart_uploads", markers, prefix):
            yield from page.get("Uploads", [])

    def _abort(self, key: str, upload_id: str) -> None:
        where = {"Bucket": self.bucket, "Key": key, "UploadId": upload_id}
        fail_point("abort", key)
        self._try(
            f"abort an upload of {key}",
            lambda fs: fs.call_s3("abort_multipart_upload", **where),
            {Trouble.UPLOAD_GONE: None, Trouble.ABSENT: None},
        )

    def _pages(
        self, method: str, markers: tuple[str, ...], prefix: str
    ) -> Iterator[dict[str, Any]]:
        request = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            page = self._try(f"list {prefix!r}", lambda fs: fs.call_s3(method, **request))
            yield page
            if not page.get("IsTruncated"):
                return
            request.update({marker: page[f"Next{marker}"] for marker in markers})

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self.prefix}{key}"

    def _body(self, fs: Any, key: str) -> bytes:
        # Not cat_file: it asks HEAD first, whose 404 does not tell an absent object from an
        # absent bucket.
        from fsspec.asyn import sync

        answer = fs.call_s3("get_object", Bucket=self.bucket, Key=self.prefix + key)
        try:
            return bytes(sync(fs.loop, answer["Body"].read))
        finally:
            answer["Body"].close()

    def _try(
        self,
        doing: str,
        call: Callable[[Any], T],
        answers: dict[Trouble, U] | None = None,
    ) -> T | U:
        """Run `call` with the file system until it answers, fails for good, or patience ends.

        `answers` maps troubles that are answers to this request to what is then returned.
        """
        waits = self.patience.waits()
        while True:
            try:
                if self._fs is None:
                    self._fs = _file_system(self.patience.request_s)
                return call(self._fs)
            except Exception as error:
                trouble = classify(error)
                if trouble is None:
                    raise
                if answers and trouble in answers:
                    return answers[trouble]
                wait = next(waits, None) if trouble in _WORTH_A_TRY else None
                cause = error.__cause__ or error  # s3fs's own text leaves the error code out
                said = scrub(f"{type(cause).__name__}: {cause}")
                if wait is None:
                    raise self._explain(trouble, doing, said) from error
            log.warning("s3://%s: cannot %s (%s); again in %.1f s", self.bucket, doing, said, wait)
            time.sleep(wait)

    def _explain(self, trouble: Trouble, doing: str, said: str) -> DittyError:
        endpoint = scrub(os.environ.get("AWS_ENDPOINT_URL_S3") or "the default AWS endpoint")
        where = f"s3://{self.bucket}/{self.prefix} at {endpoint}"
        if trouble is Trouble.LOCAL:
            return StoreError(f"cannot {doing}, {where}: this machine's disk: {said}")
        if trouble is Trouble.DENIED:
            return RemoteDenied(f"not allowed to {doing}, {where}: {said}. {_CREDENTIALS}")
        if trouble is Trouble.NO_BUCKET:
            hint = f"create it (aws s3 mb s3://{self.bucket}) or correct upload.url"
            return permanent(RemoteError(f"no bucket {self.bucket}, {where}: {hint}"))
        if trouble not in _WORTH_A_TRY:
            hint = "Check upload.url, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3"
            return permanent(RemoteError(f"cannot {doing}, {where}: {said}. {hint}"))
        hint = "Is the server up, and is AWS_ENDPOINT_URL_S3 right?"
        return RemoteError(f"cannot {doing}, {where}, after several tries: {said}. {hint}")


def _file_system(request_s: float) -> Any:
    """An s3fs file system with bounds; not from fsspec's cache, which outlives credentials."""
    import aiohttp
    import s3fs
    from aiobotocore.httpsession import AIOHTTPSession

    if "@" in os.environ.get("AWS_ENDPOINT_URL_S3", ""):  # aiohttp refuses it, after retries
        raise SpecError(f"AWS_ENDPOINT_URL_S3 holds a user name or password. {_CREDENTIALS}")

    class BoundedSession(AIOHTTPSession):
        """Adds the one limit that holds while aiohttp waits for `100 Continue`."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._timeout = aiohttp.ClientTimeout(
                total=request_s, sock_connect=CONNECT_S, sock_read=SILENCE_S
            )

    fs = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 2},
            "connect_timeout": CONNECT_S,
            "read_timeout": SILENCE_S,
            "http_session_cls": BoundedSession,
        },
    )
    fs.retries = 2  # a part of a large file is worth a second try; beyond that, `Patience`
    return fs
