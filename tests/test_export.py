"""`export` copies what a run has made, verified, and never over something else.

The result is a stand-in; that a run leaves word of its own is seen in test_finetune.
"""

import shutil
from pathlib import Path

import pytest

from ditty import stages
from ditty.artifacts import Store, verify
from ditty.errors import RemoteError, RunError
from ditty.files import write_json
from ditty.remote import Remote, final_name
from ditty.rundir import RunDir
from ditty.spec import RunSpec
from flows.export import export
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.served import tiny_spec


@pytest.fixture
def made(tmp_path: Path, home: Path, prefect_api: str) -> Path:
    """The result of the run `mine`, in the store and at its target."""
    spec = RunSpec.model_validate(tiny_spec(tmp_path, "mine", 1))
    run, store, key = RunDir.named("mine", home), Store(home), "a" * 64
    run.root.mkdir(parents=True)
    write_json(run.spec_file, spec.model_dump(mode="json"))
    write_json(run.trained_file, {"train": key})
    with store.commit("train", key, {"stage": "train"}) as out:
        (out / "adapter_model.safetensors").write_bytes(b"weights")
    assert spec.upload.url
    (tmp_path / "target").mkdir()
    Remote(spec.upload.url).put(store.path("train", key), final_name("mine", key))
    return store.path("train", key)


def test_to_a_folder_and_to_a_bucket(made: Path, tmp_path: Path, bucket: str) -> None:  # noqa: F811
    out = tmp_path / "model-1"
    done = export("mine", str(out))
    assert done["digest"] == verify(out).digest == verify(made).digest
    assert (out / "adapter_model.safetensors").read_bytes() == b"weights"
    before = (out / "adapter_model.safetensors").stat().st_ino
    assert export("mine", str(out)) == done, "a second time"
    assert (out / "adapter_model.safetensors").stat().st_ino == before

    url = f"s3://{bucket.name}/models/one"
    assert export("mine", url)["out"] == url
    manifest = Remote(f"s3://{bucket.name}/models").manifest("one")
    assert manifest and manifest.digest == done["digest"]


def test_never_over_something_else(made: Path, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    with other.commit("train", "b" * 64, {}) as out:
        (out / "adapter_model.safetensors").write_bytes(b"others")
    there = tmp_path / "there"
    shutil.copytree(other.path("train", "b" * 64), there)
    with pytest.raises(RemoteError, match="another content is committed"):
        export("mine", str(there))
    assert (there / "adapter_model.safetensors").read_bytes() == b"others"


def test_a_result_that_is_gone_here_comes_from_the_target(made: Path, tmp_path: Path) -> None:
    shutil.rmtree(made)
    export("mine", str(tmp_path / "out"))
    assert verify(tmp_path / "out").digest == verify(made).digest
    shutil.rmtree(made)
    shutil.rmtree(tmp_path / "target")
    (tmp_path / "target").mkdir()
    with pytest.raises(RunError, match="has no result"):
        export("mine", str(tmp_path / "more"))


def test_no_such_run(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run yours .* runs there: mine"):
        export("yours", str(tmp_path / "out"))


def test_two_places_are_two_stages() -> None:
    assert stages.export_ref("a", "file:///x").key != stages.export_ref("a", "file:///y").key
