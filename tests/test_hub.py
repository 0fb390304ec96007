"""The hub, played by a server on localhost, and what happens without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ditty.errors import ModelError, RemoteError
from ditty.pretrained import hub

from .fake_hub import COMMIT, REPO, FakeHub, fake_hub, use_endpoint

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "pytorch_model.bin": b"the same weights again",
    "consolidated.safetensors": b"and again",
    "onnx/config.json": b"{}",
    "README.md": b"# Tiny",
}
DEAD = "http://127.0.0.1:9"  # the discard port, at which nothing listens


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name, data in FILES.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with fake_hub(tmp_path / "repository", cache, monkeypatch) as running:
        yield running


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_resolve_asks_once(server: FakeHub, revision: str | None) -> None:
    assert hub.resolve(REPO, revision) == COMMIT
    assert len(server.requests) == 1


def test_a_commit_needs_no_request(server: FakeHub) -> None:
    assert hub.resolve(REPO, "a" * 40) == "a" * 40
    assert server.requests == []


def test_download_takes_what_from_pretrained_reads(server: FakeHub) -> None:
    assert hub.snapshot(REPO, COMMIT) is None
    folder = hub.download(REPO, COMMIT)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert hub.snapshot(REPO, COMMIT) == folder


def test_second_download_transfers_nothing(server: FakeHub) -> None:
    folder = hub.download(REPO, COMMIT)
    server.requests.clear()
    assert hub.download(REPO, COMMIT) == folder
    assert not [request for request in server.requests if "/resolve/" in request]


def test_snapshot_with_a_missing_file_is_none(server: FakeHub) -> None:
    folder = hub.download(REPO, COMMIT)
    (folder / "tokenizer.json").unlink()
    assert hub.snapshot(REPO, COMMIT) is None
    hub.download(REPO, COMMIT)
    assert hub.snapshot(REPO, COMMIT) == folder


def test_snapshot_of_pickled_weights_without_a_tokenizer_is_none(
    server: FakeHub, tmp_path: Path
) -> None:
    """As AutoModel.from_pretrained of another program leaves it."""
    (tmp_path / "repository" / "model.safetensors").unlink()
    folder = hub.download(REPO, COMMIT)
    assert hub.snapshot(REPO, COMMIT) == folder and (folder / "pytorch_model.bin").exists()
    (folder / "tokenizer.json").unlink()
    assert hub.snapshot(REPO, COMMIT) is None


@pytest.mark.parametrize("revision", [None, "v1"])
def test_without_the_hub_a_downloaded_revision_is_known(
    server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    folder = hub.download(REPO, hub.resolve(REPO, revision), revision)
    use_endpoint(DEAD, cache, monkeypatch)
    assert hub.resolve(REPO, revision) == COMMIT
    assert hub.snapshot(REPO, COMMIT) == folder
    with pytest.raises(ModelError, match="revision other"):
        hub.resolve(REPO, "other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no complete snapshot"):
        hub.resolve(REPO, revision)


def test_a_hub_in_trouble_counts_as_absent(server: FakeHub) -> None:
    hub.download(REPO, COMMIT)
    server.refuse = 503
    assert hub.resolve(REPO) == COMMIT
    with pytest.raises(RemoteError, match="503"):
        hub.ask_commit(REPO)


def test_without_hub_and_snapshot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(DEAD, cache, monkeypatch)
    (cache / "models--tiny-org--tiny-modell").mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        hub.resolve(REPO)
    for part in (
        REPO,
        "cannot be asked",
        str(cache),
        "a folder or a .gguf",
        "tiny-org/tiny-modell",
    ):
        assert part in str(caught.value)
    with pytest.raises(RemoteError, match="cannot be asked"):
        hub.download(REPO, COMMIT)


def test_offline_mode_is_a_hub_that_does_not_answer(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.download(REPO, COMMIT)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(REPO) == COMMIT
    assert server.requests == []


def test_unknown_model_and_revision(server: FakeHub) -> None:
    with pytest.raises(ModelError, match="no model tiny-org/other.*by its path"):
        hub.resolve("tiny-org/other")
    with pytest.raises(ModelError, match="no revision 'v9'"):
        hub.resolve(REPO, "v9")
    with pytest.raises(ModelError, match="no revision"):
        hub.download(REPO, "b" * 40, "b" * 40)


def test_a_refusal_is_not_repaired_from_the_cache(server: FakeHub) -> None:
    hub.download(REPO, COMMIT)
    server.refuse = 403
    with pytest.raises(ModelError, match="refused .* 403"):
        hub.resolve(REPO)


def test_repository_without_safetensors(server: FakeHub) -> None:
    (server.folder / "model.safetensors").unlink()
    folder = hub.download(REPO, COMMIT)
    assert (folder / "pytorch_model.bin").read_bytes() == b"the same weights again"
    assert hub.snapshot(REPO, COMMIT) == folder
    assert len([r for r in server.requests if r == f"GET /{REPO}/resolve/{COMMIT}/config.json"]) < 2


def test_repository_without_weights(server: FakeHub) -> None:
    (server.folder / "model.safetensors").unlink()
    (server.folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="has neither model.safetensors"):
        hub.download(REPO, COMMIT)
