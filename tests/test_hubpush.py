"""Pushes to a hub, played by a server on localhost; huggingface_hub itself talks to it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ditty.errors import ArtifactDamaged, RemoteDenied, RemoteError, SpecError
from ditty.results import hubpush
from ditty.results.hubpush import check, push, repo_of
from ditty.store.artifacts import Store
from tests.push_hub import TOKEN, PushHub, push_hub

REPO = "my-org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    # The client's own pauses before it tries again are seconds; httpx is what it waits with.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with push_hub(tmp_path / "cache", monkeypatch) as running:
        yield running


def folder(home: Path, key: str = "a", shards: int = 3, seed: int = 0) -> Path:
    """A committed directory of several large files and some small ones."""
    store = Store(home)
    with store.commit("package", key * 64, {}) as out:
        for number in range(shards):
            content = bytes([seed + number]) * 5000
            (out / f"model-{number + 1:05d}-of-{shards:05d}.safetensors").write_bytes(content)
        (out / "model.safetensors.index.json").write_text("{}")
        (out / "config.json").write_text('{"a": 1}')
        (out / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return store.path("package", key * 64)


def test_one_commit_of_a_private_repository(hub: PushHub, home: Path) -> None:
    made = folder(home)
    url = push(made, REPO, TOKEN)
    repo = hub.repos[REPO]
    assert repo["private"] and len(repo["commits"]) == 1 and hub.holds(REPO, made)
    assert url == f"{hub.url}/{REPO}/commit/{1:040x}"
    assert len(hub.puts) == 4, "three shards and the manifest, which is large here"
    push(made, REPO, TOKEN)
    assert len(repo["commits"]) == 1 and len(hub.puts) == 4, "nothing is sent twice"
    push(made, "me/open", TOKEN, private=False)
    assert not hub.repos["me/open"]["private"]


def test_a_push_that_was_cut_goes_on_where_it_was(hub: PushHub, home: Path) -> None:
    made = folder(home)
    hub.cut_after = 2
    with pytest.raises(RemoteError, match="did not end .* goes on where it was") as cut:
        push(made, REPO, TOKEN)
    assert cut.value.retryable and httpx.RemoteProtocolError.__name__ in str(cut.value)
    assert hub.repos[REPO]["commits"] == [], "half of it is not shown"
    before = list(hub.puts)
    hub.cut_after = None
    push(made, REPO, TOKEN)
    assert hub.holds(REPO, made) and len(hub.repos[REPO]["commits"]) == 1
    assert len(before) == 2 and len(set(hub.puts)) == len(hub.puts) == 4


def test_weights_of_an_earlier_push_go_in_the_same_commit(hub: PushHub, home: Path) -> None:
    push(folder(home), REPO, TOKEN)
    hub.repos[REPO]["files"]["notes.txt"] = b"by hand"
    hub.repos[REPO]["files"]["adapter_config.json"] = b"{}"  # would send a reader to the base
    made = folder(home, "b", shards=2, seed=7)
    push(made, REPO, TOKEN)
    assert len(hub.repos[REPO]["commits"]) == 2
    assert hub.repos[REPO]["files"].pop("notes.txt") == b"by hand"
    assert hub.holds(REPO, made)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json"])
def test_what_the_hub_has_is_compared(hub: PushHub, home: Path, name: str) -> None:
    hub.damage = name
    with pytest.raises(RemoteError, match=f"does not hold {name} as it was sent"):
        push(folder(home), REPO, TOKEN)


def test_what_is_damaged_here_is_not_sent(hub: PushHub, home: Path) -> None:
    made = folder(home)
    (made / "config.json").write_text('{"a": 2}')
    with pytest.raises(ArtifactDamaged):
        push(made, REPO, TOKEN)
    assert hub.repos == {}


def test_a_token_is_asked_for_before_anything_is_made(hub: PushHub, home: Path) -> None:
    check(REPO, TOKEN)
    check("me/tiny", TOKEN)
    with pytest.raises(RemoteDenied, match="no token for the hub, .* set HF_TOKEN"):
        check(REPO, None)
    with pytest.raises(RemoteDenied, match="is of me, who writes to me, my-org at the hub, not to"):
        check("other/tiny", TOKEN)
    with pytest.raises(RemoteDenied, match="does not let this token write") as denied:
        check(REPO, "hf_wrongWRONGwrong")
    assert "wrongWRONG" not in str(denied.value) and not denied.value.retryable
    with pytest.raises(RemoteDenied):
        push(folder(home), REPO, "hf_wrongWRONGwrong")
    assert hub.repos == {}


@pytest.mark.parametrize("out", ["hub:", "hub:name", "hub:a/b/c", "hub:../x", "hub:a/b--c"])
def test_what_is_no_repository(out: str) -> None:
    with pytest.raises(SpecError, match="expected hub:ORG/NAME"):
        repo_of(out)
    assert repo_of("hub:a-b/c.d") == "a-b/c.d" and repo_of("s3://a/b") is None


def test_a_file_is_called_as_git_calls_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some\0bytes\n")
    command = ["git", "hash-object", "--no-filters", str(tmp_path / "file")]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert hubpush.git_blob_id(tmp_path / "file") == named
