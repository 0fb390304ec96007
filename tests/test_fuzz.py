"""What others write: any spec, manifest or listing is taken or refused in words, never a traceback.

Nothing is written but below the folder that it was meant for. The examples are the same each time.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ditty.config.spec import RunSpec
from ditty.config.specfile import load_spec, parse_spec
from ditty.errors import ArtifactDamaged, DittyError, RunError, SpecError
from ditty.runs.rundir import RunDir, best_step
from ditty.store.artifacts import MANIFEST, Manifest, read_manifest, verify
from ditty.store.files import sha256_bytes
from ditty.store.remote import Remote
from flows.mirror import fetch_newer
from tests.test_specs import MINIMAL

FUZZ = settings(
    derandomize=True,
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a home, which is not written to
)
LOG = logging.getLogger(__name__)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3)
    ),
    max_leaves=6,
)
SPEC = RunSpec.model_validate(MINIMAL).model_dump(mode="json")
HOSTILE = [
    "../x", "a/../../x", "/tmp/x", "..", ".", "", "a//b", "a/", "./a", "C:\\x", "..\\x", "a\\..\\b",
    "nul\0l", "line\nbreak", "x" * 300, "d/" * 600 + "x", "\ud800", "~/x", "a/manifest.json",
]  # fmt: skip
PART = st.sampled_from(["..", ".", "", "a", "b", "\\", "C:", "\0", "x" * 260, "manifest.json"])
PATHS = st.sampled_from(HOSTILE) | st.lists(PART, min_size=1, max_size=5).map("/".join)


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value within plain values stands."""
    if at:
        yield at
    places: Any = enumerate(value) if isinstance(value, list) else ()
    for key, inside in value.items() if isinstance(value, dict) else places:
        yield from paths_in(inside, (*at, key))


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value with up to three places changed, removed, or given a key too many."""
    value = deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(paths_in(value)) or [("none",)]))
        target = value
        for key in parents:
            target = target[key]
        how = draw(st.sampled_from(["change", "remove", "add"]))
        if how == "add" and isinstance(target, dict):
            target[draw(st.text(max_size=6))] = draw(VALUES)
        elif how == "remove" and (isinstance(target, list) or last in target):
            del target[last]
        else:
            target[last] = draw(VALUES)
    return value


writes: list[str] | None = None  # the paths that this process has opened to write, while watched


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if writes is None:
        return
    if event == "open" and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.link", "os.symlink", "os.rename", "os.remove"):
        writes.extend(os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes))


sys.addaudithook(_note)


@contextmanager
def writing_only_below(*roots: Path) -> Iterator[None]:
    """Python itself tells of what is written, however it is done."""
    global writes
    writes = []
    try:
        yield
        outside = [p for p in writes if not any(Path(p).is_relative_to(root) for root in roots)]
        assert outside == []
    finally:
        writes = None


def taken_or_refused(value: Any) -> None:
    try:
        spec = parse_spec(value)
    except SpecError as error:
        assert len(str(error).split()) > 2, "in words"
    else:
        runs = RunDir.named("x").root.parent
        assert RunDir.named(spec.name).root.resolve().parent == runs.resolve()
        assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


@FUZZ
@given(mutated(SPEC))
def test_a_spec_with_a_mistake(value: Any) -> None:
    with writing_only_below():
        taken_or_refused(value)


@FUZZ
@given(st.dictionaries(st.sampled_from([*RunSpec.model_fields, "x"]), VALUES))
def test_a_spec_of_anything(value: Any) -> None:
    taken_or_refused(value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_is_named_by_no_path(name: str) -> None:
    with pytest.raises(RunError, match="is no run name"):
        RunDir.named(name)


@FUZZ
@given(st.sampled_from(HOSTILE) | st.text(), st.sampled_from(HOSTILE) | st.text())
def test_names_and_urls_of_a_spec(name: str, url: str) -> None:
    taken_or_refused(SPEC | {"name": name})
    taken_or_refused(SPEC | {"upload": {"url": f"file:///{url}"}})
    taken_or_refused(SPEC | {"upload": {"url": f"s3://{url}"}})


@FUZZ
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | mutated(SPEC).map(lambda value: yaml.safe_dump(value).encode()),
    st.lists(st.text(max_size=20) | st.sampled_from(["train.seed=1", "a.b.c=[", "name=x"])),
)
@example(b"a: &a [*a]", [])
@example(b"[" * 20_000, [])
@example(b"? [a]\n: b", [])
@example(b"1: 2", [])
@example(b"a: 2026-13-45", [])
def test_a_spec_file_of_anything(content: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(content)
        with writing_only_below(Path(folder)):
            try:
                load_spec(path, overrides)
            except SpecError as error:
                assert len(str(error).split()) > 2


FILES = {"weights": b"w", "sub/state.json": b'{"best_step": 1}'}
GOOD: dict[str, Any] = {
    "version": 1,
    "facts": {"step": 3, "identity": {"test": "same"}},
    "files": [
        {"path": path, "size": len(data), "sha256": sha256_bytes(data)}
        for path, data in FILES.items()
    ],
}
MANIFESTS = (
    mutated(GOOD)
    | VALUES
    | PATHS.map(lambda path: {**GOOD, "files": [{**GOOD["files"][0], "path": path}]})
    | st.lists(PATHS, max_size=3).map(
        lambda paths: {**GOOD, "files": [{**GOOD["files"][0], "path": p} for p in paths]}
    )
)


def test_the_good_manifest_is_good() -> None:
    assert set(Manifest.from_json(GOOD, "here").files) == {*FILES}


@pytest.mark.parametrize("path", HOSTILE[:-2])
def test_a_path_that_leaves_its_directory_or_cannot_be_written(path: str) -> None:
    value = {**GOOD, "files": [{**GOOD["files"][0], "path": path}]}
    with pytest.raises(ArtifactDamaged, match="here is not a manifest"):
        Manifest.from_json(value, "here")


@pytest.mark.parametrize("size", [-1, 1.5, "1", True, float("inf"), None])
def test_a_size_that_is_none(size: Any) -> None:
    value = {**GOOD, "files": [{**GOOD["files"][0], "size": size}]}
    with pytest.raises(ArtifactDamaged, match="'weights' has size"):
        Manifest.from_json(value, "here")


@FUZZ
@given(MANIFESTS)
@example({**GOOD, "files": [{**GOOD["files"][0], "size": float("inf")}]})
def test_a_manifest_of_anything(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        (root / MANIFEST).write_text(json.dumps(value))
        with writing_only_below():
            try:
                manifest = read_manifest(root)
            except ArtifactDamaged:
                return
            for path in manifest.files:
                assert (root / path).resolve().is_relative_to(root.resolve())
            try:
                verify(root)
            except ArtifactDamaged:
                pass


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"9" * 5000])
def test_a_manifest_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactDamaged):
        read_manifest(tmp_path)


@FUZZ
@given(MANIFESTS, VALUES)
@example({**GOOD, "facts": {"identity": 1}}, 0)
@example(GOOD, {"best_step": "x"})
def test_a_target_that_holds_anything(value: Any, state: Any) -> None:
    """A resume takes it, passes it over, or says why not; and writes below its run alone."""
    with tempfile.TemporaryDirectory() as folder:
        target, home = Path(folder) / "target", Path(folder) / "home"
        copy = target / "x/checkpoints/step_000000003"
        (copy / "sub").mkdir(parents=True)
        for name, data in FILES.items():
            (copy / name).write_bytes(data)
        (copy / MANIFEST).write_text(json.dumps(value))
        (Path(folder) / "x").write_bytes(b"w")  # what a path that leaves its directory would reach
        remote, run = Remote(target.as_uri()), RunDir.named("x", home)
        with writing_only_below(home):
            try:
                step = fetch_newer(run, remote, {"test": "same"}, LOG)
            except DittyError as error:
                assert len(str(error).split()) > 2
            else:
                assert step == 3 and verify(run.checkpoint(3)).files == read_manifest(copy).files
        state_file = run.checkpoints / "step_000000009" / "state.json"
        state_file.parent.mkdir(parents=True)
        state_file.write_text(json.dumps(state))
        try:
            assert best_step(state_file.parent) in (None, state.get("best_step") if state else None)
        except ArtifactDamaged:
            pass
