"""Names of base models: a folder, a .gguf file, the hub; and what each is identified by."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditty.errors import ModelError, SpecError
from ditty.pretrained import basemodel
from ditty.pretrained.basemodel import Kind, fetch, identify, key, locate
from ditty.store.artifacts import Store

from .fake_hub import COMMIT, REPO, FakeHub, fake_hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "tiny"
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (path / name).write_text("{}")
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(folder, tmp_path / "cache", monkeypatch) as running:
        yield running


def test_folder(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = identify(str(folder))
    assert (ref.kind, ref.name) == (Kind.FOLDER, str(folder))
    assert locate(ref, store) == folder
    monkeypatch.chdir(folder.parent)
    assert identify("tiny") == ref


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert identify("~/tiny").name == str(folder)


def test_same_content_has_the_same_key(folder: Path) -> None:
    before = key(identify(str(folder)))
    moved = folder.rename(folder.with_name("moved"))
    assert key(identify(str(moved))) == before
    (moved / "model.safetensors").write_text("other")
    assert key(identify(str(moved))) != before


def test_gguf_is_the_conversion_in_the_store(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    ref = identify(str(file))
    assert ref.kind is Kind.GGUF
    assert ref.identity == {"sha256": hashlib.sha256(b"GGUF").hexdigest()}
    assert locate(ref, store) is None
    with store.commit("fetch", key(ref), {}) as out:
        (out / "config.json").write_text("{}")
    assert locate(ref, store) == store.path("fetch", key(ref))
    (store.path("fetch", key(ref)) / "config.json").write_text("[]")
    assert locate(ref, store) is None, "a damaged conversion was handed out"


def test_gguf_key_follows_the_converters_version(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    refs = [identify(str(tmp_path / "tiny.gguf")), identify(str(folder))]
    before = [key(ref) for ref in refs]
    monkeypatch.setitem(basemodel.CONVERSIONS, Kind.GGUF, {"gguf_version": 99})
    assert [key(ref) != old for ref, old in zip(refs, before, strict=True)] == [True, False]


def test_hub(server: FakeHub, store: Store) -> None:
    ref = identify(REPO)
    assert (ref.kind, ref.name) == (Kind.HUB, REPO)
    assert ref.identity == {"repo": REPO, "commit": COMMIT}
    assert key(identify(REPO, "v1")) == key(ref) == key(identify(REPO, COMMIT))
    assert locate(ref, store) is None
    snapshot = fetch(ref, store)
    assert locate(ref, store) == snapshot
    assert (snapshot / "model.safetensors").read_text() == "{}"
    assert not store.home.exists()


@pytest.mark.parametrize("name", ["tinny", "tiny.ggu", "tiny/deeper/model.gguf"])
def test_unknown_path_names_the_nearest(folder: Path, name: str) -> None:
    (folder.parent / "tiny.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=f"there is no {folder.parent / name}") as caught:
        identify(str(folder.parent / name))
    if "deeper" not in name:
        assert f"did you mean {folder.parent}/tiny" in str(caught.value)


def test_what_the_root_holds_was_not_meant() -> None:
    with pytest.raises(ModelError, match="there is no /tmpp: / has no tmpp$"):
        identify("/tmpp")


def test_unknown_relative_path_names_the_nearest(
    folder: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(ModelError, match="did you mean models/tiny?"):
        identify("models/tinny")


@pytest.mark.parametrize("name", ["", "a/b/c", "org/../name", "org name", "-x"])
def test_neither_path_nor_hub_id(
    name: str, server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        identify(name)
    assert server.requests == []


def test_a_file_of_another_kind(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file, expected a folder"):
        identify(str(folder / "model.safetensors"))


def test_revision_of_a_path(folder: Path) -> None:
    with pytest.raises(SpecError, match="model.revision: got 'main'"):
        identify(str(folder), "main")


def test_imports_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys; import ditty.pretrained.basemodel, ditty.pretrained.demo_model; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
