"""Sources by URL: S3 as moto plays it, a web server, and fsspec's own memory."""

# ruff: noqa: F811  (imported fixtures)

import gzip
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import boto3
import fsspec
import pyarrow as pa
import pytest
import yaml
from botocore.config import Config
from pyarrow import parquet

from ditty.config.dataspec import DataSpec
from ditty.config.specfile import load_spec
from ditty.dataset import remotefiles, tables
from ditty.dataset.sources import identify, load
from ditty.errors import DataError, RemoteDenied, RemoteError
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401

ROWS = [{"text": f"row {i}", "n": i} for i in range(5)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def loaded(tmp_path: Path, source: str, identity: Any = None, **spec: Any) -> list[dict[str, Any]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    load(DataSpec(source=source, **spec), out, identity)
    assert [p.name for p in out.iterdir()] == ["data.arrow"], "what was fetched does not stay"
    return tables.read(out / "data.arrow").to_pylist()


def identity_of(source: str, **spec: Any) -> dict[str, Any]:
    return identify(DataSpec(source=source, **spec))


# S3


def test_s3_objects_are_rows_and_known_by_their_etag(tmp_path: Path, bucket) -> None:
    url = f"s3://{bucket.name}/data/rows.jsonl"
    stored = bucket.put_object(Key="data/rows.jsonl", Body=lines(ROWS))
    one = identity_of(url)
    assert stored.e_tag.strip('"') in json.dumps(one)
    assert loaded(tmp_path, url, one) == ROWS
    assert loaded(tmp_path, url, one, max_rows=2) == ROWS[:2]
    bucket.put_object(Key="data/rows.jsonl", Body=lines(ROWS))
    assert identity_of(url) == one, "the same content again"
    bucket.put_object(Key="data/rows.jsonl", Body=lines(ROWS[::-1]))
    assert identity_of(url) != one
    with pytest.raises(DataError, match="rows.jsonl is not what it was when this run began"):
        loaded(tmp_path, url, one)


def test_a_pattern_of_objects(tmp_path: Path, bucket) -> None:
    bucket.put_object(Key="p/b.jsonl.gz", Body=gzip.compress(lines(ROWS[3:])))
    bucket.put_object(Key="p/a.jsonl", Body=lines(ROWS[:3]))
    bucket.put_object(Key="p/README.md", Body=b"")
    url = f"s3://{bucket.name}/p/*.jsonl*"
    assert loaded(tmp_path, url, identity_of(url)) == ROWS
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    bucket.upload_file(str(tmp_path / "rows.parquet"), "q/rows.parquet")
    assert loaded(tmp_path, f"s3://{bucket.name}/q/*.parquet") == ROWS
    bucket.put_object(Key="q/bad.csv", Body=b"a\n\xff\n")
    told = rf"s3://{bucket.name}/q/bad.csv: 1 of 1 rows .* not UTF-8, at row 2 "
    with pytest.raises(DataError, match=told):
        loaded(tmp_path, f"s3://{bucket.name}/q/bad.csv")


def test_an_object_that_is_replaced_while_a_pattern_is_read(
    tmp_path: Path, bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the listing that names it, from which s3fs would answer."""
    bucket.put_object(Key="r/rows.jsonl", Body=lines(ROWS))
    url = f"s3://{bucket.name}/r/*.jsonl"
    known = identity_of(url)
    find = remotefiles._find

    def find_and_replace(source: str) -> Any:
        found = find(source)
        bucket.put_object(Key="r/rows.jsonl", Body=lines(ROWS[::-1]))
        return found

    monkeypatch.setattr(remotefiles, "_find", find_and_replace)
    with pytest.raises(DataError, match="is not what it was when this run began"):
        loaded(tmp_path, url, known)


def presigned(bucket, version: str) -> str:
    config = Config(signature_version=version)
    place = bucket.meta.client.meta.endpoint_url
    client = boto3.client("s3", endpoint_url=place, config=config)
    what = {"Bucket": bucket.name, "Key": "rows.jsonl"}
    return client.generate_presigned_url("get_object", what)


def test_a_presigned_url_is_a_credential(bucket) -> None:
    """As boto3 signs it; none of it may be written down, for whoever has it may read."""
    bucket.put_object(Key="rows.jsonl", Body=lines(ROWS))
    signed = [presigned(bucket, version) for version in ("s3", "s3v4")]
    assert all(urllib.request.urlopen(url).read() == lines(ROWS) for url in signed)
    for url in (
        *signed,
        "https://account.blob.core.windows.net/c/rows.jsonl?sv=2024-11-04&sp=r&sig=long-canary",
        "https://storage.googleapis.com/b/rows.jsonl?X-Goog-Signature=long-canary",
    ):
        told = r"rows.jsonl\?.*=\.\.\. has credentials .* s3://bucket/"
        with pytest.raises(DataError, match=told) as error:
            identity_of(url)
        values = [value for _, value in parse_qsl(urlsplit(url).query) if len(value) > 8]
        assert values and not any(value in str(error.value) for value in values)


def test_what_is_not_there_and_who_may_not(bucket, s3_env: pytest.MonkeyPatch) -> None:
    url = f"s3://{bucket.name}"
    bucket.put_object(Key="x.md", Body=b"")
    for source, message in {
        f"{url}/no.jsonl": "there is no file s3://.*/no.jsonl",
        f"{url}/no*.jsonl": "no file matches",
        f"{url}/x.md": "x.md has the suffix '.md', expected one of .jsonl",
        "s4://bucket/rows.jsonl": "cannot be opened: .*s4",
        "https://me:secret@host/rows.jsonl": "has credentials in it",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            identity_of(source)
        assert "secret" not in str(error.value)
    s3_env.delenv("AWS_ACCESS_KEY_ID")
    s3_env.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteDenied, match="credentials come from the environment"):
        identity_of(f"{url}/no.jsonl")


# The web


class Web:
    """Serves one file; `tag` is its ETag, `asked` the methods of the requests for it."""

    def __init__(self) -> None:
        self.body, self.tag = lines(ROWS), '"one"'
        self.asked: list[str] = []
        self.status = 200
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.command)
                found = self.path.startswith("/rows.jsonl")
                self.send_response(web.status if found else 404)
                if web.tag:
                    self.send_header("ETag", web.tag)
                self.send_header("Content-Length", str(len(web.body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(web.body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web() -> Iterator[Web]:
    made = Web()
    threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_strong_etag_is_asked_for_and_a_weak_one_is_not_trusted(tmp_path: Path, web: Web) -> None:
    url = f"{web.url}/rows.jsonl"
    strong = identity_of(url)
    assert web.asked == ["HEAD"], "the content is not read for it"
    web.tag = '"two"'
    assert identity_of(url) != strong
    for tag in ('W/"one"', ""):
        web.tag, web.body = tag, lines(ROWS)
        first = identity_of(url)
        assert loaded(tmp_path, url, first) == ROWS
        web.body = lines(ROWS[::-1])  # of the same length, and under the same tag
        assert identity_of(url) != first
        with pytest.raises(DataError, match="is not what it was"):
            loaded(tmp_path, url, first)
    assert loaded(tmp_path, f"{url}?download=true") == ROWS[::-1]
    with pytest.raises(DataError, match="there is no file .*/other.jsonl"):
        identity_of(f"{web.url}/other.jsonl")


def test_a_place_that_does_not_answer_or_refuses(web: Web) -> None:
    web.status = 403
    with pytest.raises(RemoteDenied, match="rows.jsonl may not be read .*403"):
        identity_of(f"{web.url}/rows.jsonl")
    web.status = 500
    with pytest.raises(RemoteError, match="rows.jsonl cannot be read: .*500"):
        identity_of(f"{web.url}/rows.jsonl")
    with pytest.raises(RemoteError, match="http://127.0.0.1:9/rows.jsonl cannot be read") as error:
        identity_of("http://127.0.0.1:9/rows.jsonl")
    assert error.value.retryable


# Anything else of fsspec's


def test_where_there_are_no_etags_the_content_tells(tmp_path: Path, monkeypatch) -> None:
    memory = fsspec.filesystem("memory")
    for name, rows in (("x", ROWS), ("y", ROWS), ("z", ROWS[:1])):
        memory.pipe_file(f"/ditty/{name}.jsonl", lines(rows))
    x, y, z = (identity_of(f"memory://ditty/{name}.jsonl") for name in "xyz")
    assert x == y != z
    assert loaded(tmp_path, "memory://ditty/x.jsonl", x) == ROWS
    local = tmp_path / "rows.jsonl"
    local.write_bytes(lines(ROWS))
    assert loaded(tmp_path, local.as_uri(), identity_of(local.as_uri())) == ROWS
    csv = local.with_suffix(".csv")
    csv.write_text("q,text\n1,007\n")
    typed = [{"format": "text"}, {"format": "text", "columns": {"text": "q"}}]
    assert identity_of(csv.as_uri(), **typed[0]) != identity_of(csv.as_uri(), **typed[1])
    assert loaded(tmp_path, csv.as_uri(), **typed[0]) == [{"q": 1, "text": "007"}]
    # A spec beside a folder called `memory` means the URL all the same.
    (tmp_path / "memory").mkdir()
    values = {"data": {"source": "memory://ditty/x.jsonl"}, "model": {"base_model": "org/name"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    assert load_spec(tmp_path / "spec.yaml").data.source == "memory://ditty/x.jsonl"
