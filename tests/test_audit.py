"""`ditty verify` names exactly the files that a test has damaged, wherever they are."""

# ruff: noqa: F811  (imported fixtures)
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditty.runs.rundir import RunDir
from ditty.store.artifacts import MANIFEST, Store
from ditty.store.files import write_json
from ditty.store.remote import Remote
from flows.commands.cli import app
from tests.remotes import bucket, committed, contents, moto_url, s3_env  # noqa: F401

PACK, TRAIN = "a" * 64, "b" * 64
FILES = {"weights.safetensors": b"w" * 5000, "sub/state.json": b"{}"}


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket').name}/copies"
    (tmp_path / "target").mkdir()
    return (tmp_path / "target").as_uri()


@pytest.fixture
def home(home: Path) -> Path:
    """A run with two checkpoints and a result, made of packed rows; and another run's artifact."""
    store, run = Store(home), RunDir.named("mine", home)
    inputs = {"data": PACK}
    committed(store.path("pack", PACK), FILES, stage="pack", inputs={})
    committed(store.path("train", TRAIN), FILES, stage="train", inputs=inputs)
    committed(store.path("load", "c" * 64), FILES, stage="load", inputs={})
    for step in (1, 2):
        committed(run.checkpoint(step), FILES, step=step, identity=inputs)
    write_json(run.trained_file, {"train": TRAIN})
    return home


def verify(*arguments: str) -> tuple[int, list[str]]:
    """(exit code, the lines that tell of a fault)"""
    done = CliRunner().invoke(app, ["verify", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    lines = done.output.splitlines()
    assert f"{sum('✗' in x for x in lines)} faults" in lines[-1] or done.exit_code == 0
    return done.exit_code, [line.removeprefix("✗ ") for line in lines if "✗" in line]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    same = path.rename(path.with_name(".same"))
    path.symlink_to(same.name)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "does not match the SHA-256": flip,
    "has 4999 bytes": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is missing": Path.unlink,
    "not a plain file": link,
    "no manifest.json": lambda path: (path.parent / MANIFEST).unlink(),
    "is not JSON": lambda path: (path.parent / MANIFEST).write_bytes(b"{"),
}


def test_all_is_as_it_was(home: Path) -> None:
    assert verify() == verify("mine") == verify(str(home / "store")) == (0, [])


@pytest.mark.parametrize("said", DAMAGE)
@pytest.mark.parametrize("place", ["store/pack/" + PACK, "runs/mine/checkpoints/step_000000001"])
def test_what_is_damaged_is_named(home: Path, place: str, said: str) -> None:
    DAMAGE[said](home / place / "weights.safetensors")
    for arguments in ([], ["mine"], [str(home / place)]):
        code, faults = verify(*arguments)
        assert code == 1
        ours = [fault for fault in faults if "is in no manifest" not in fault]
        assert len(ours) == 1 and said in ours[0] and str(home / place) in ours[0], faults
    assert verify(str(home / "store/load"))[0] == 0


def test_a_file_of_no_manifest_and_what_is_to_be_done(home: Path) -> None:
    (home / "store/pack" / PACK / "sub/more.py").touch()
    flip(home / "store/train" / TRAIN / "sub/state.json")
    code, faults = verify("mine")
    assert code == 1 and len(faults) == 2
    output = CliRunner().invoke(app, ["verify", "mine"]).output
    assert "sub/more.py is in no manifest" in output and "remove it" in output
    assert "makes the stage train again" in output


def test_a_result_that_is_gone_is_missing(home: Path) -> None:
    (home / "store/train" / TRAIN).rename(home / "elsewhere")
    assert verify("mine") == (1, [f"{home}/store/train/{TRAIN} is missing"])


def test_copies_are_fetched_and_read(home: Path, url: str, tmp_path: Path, bucket: Any) -> None:
    remote, run = Remote(url), RunDir.named("mine", home)
    remote.put(run.checkpoint(2), "mine/checkpoints/step_000000002")
    remote.put(Store(home).path("train", TRAIN), f"mine/final/{TRAIN}")
    write_json(run.spec_file, {"upload": {"url": url}})
    assert verify(url) == verify("mine") == verify(f"{url}/mine/final/{TRAIN}") == (0, [])

    def put(name: str, data: bytes) -> None:
        if url.startswith("s3:"):
            bucket.put_object(Key=f"copies/mine/final/{TRAIN}/{name}", Body=data)
        else:
            (tmp_path / "target/mine/final" / TRAIN / name).write_bytes(data)

    put("weights.safetensors", b"v" * 5000)
    put("more", b"")
    before = contents(home)
    for where in (url, "mine", f"{url}/mine/final/{TRAIN}"):
        code, (first, second) = verify(where)
        assert code == 1
        assert f"{url}/mine/final/{TRAIN}/weights.safetensors is damaged" in first
        assert second == f"{url}/mine/final/{TRAIN}/more is in no manifest"
    assert contents(home) == before, "verifying leaves nothing behind"
    put(MANIFEST, b"{")
    for where in (url, "mine", f"{url}/mine/final/{TRAIN}"):
        code, (only,) = verify(where)
        assert code == 1 and f"mine/final/{TRAIN}/{MANIFEST} is not JSON" in only


def test_what_is_not_there_is_an_error(home: Path, tmp_path: Path) -> None:
    (tmp_path / "an empty place").mkdir()
    for what in (
        "nobody",
        str(tmp_path / "an empty place"),
        (tmp_path / "an empty place").as_uri(),
    ):
        done = CliRunner().invoke(app, ["verify", what])
        assert done.exit_code == 1 and "nothing is committed at" in str(done.exception), what
