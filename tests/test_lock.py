"""The lock: each pin has its hashes, and together they are all that pyproject.toml asks for.

The oracle is what the packages that are installed here say that they need.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ditty.errors import EXTRAS

ROOT = Path(__file__).parent.parent
FILES = {p.name: p.read_text() for p in (ROOT / ".ci").glob("lock*.txt")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACES = [(python, machine) for python in ("3.11", "3.12") for machine in ("x86_64", "aarch64")]


def blocks(text: str) -> list[tuple[Requirement, list[str]]]:
    """(pin, hashes) of each package."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = []
    for block in "\n".join(lines).replace("\\\n", " ").splitlines():
        pin, *hashes = block.split("--hash=")
        found.append((Requirement(pin.strip()), [h.strip() for h in hashes]))
    return found


def place(python: str, machine: str) -> Environment:
    full = {"python_version": python, "python_full_version": f"{python}.7"}
    return default_environment() | full | {"platform_machine": machine}  # type: ignore[return-value]


def pins(environment: Environment, build: str) -> dict[str, str]:
    """Version by name, of what the lock installs there, with torch's build `cpu` or `cuda`."""
    found: dict[str, str] = {}
    for pin, _ in blocks(FILES["lock.txt"] + FILES[f"lock-{build}.txt"]):
        if pin.marker is None or pin.marker.evaluate(dict(environment)):
            (exactly,) = pin.specifier
            assert exactly.operator == "==" and found.setdefault(pin.name, exactly.version)
            assert found[pin.name] == exactly.version, f"{pin.name} is pinned twice"
    return found


def asked() -> list[Requirement]:
    project = PROJECT["project"]
    texts = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    extras = project["optional-dependencies"]
    return [*map(Requirement, [*texts, *extras["dedup"], *extras["test"]])]


def applying(
    wanted: list[Requirement], environment: Environment, extra: str = ""
) -> list[Requirement]:
    values = {**environment, "extra": extra}
    return [r for r in wanted if r.marker is None or r.marker.evaluate(values)]


def unmet(wanted: list[Requirement], pinned: dict[str, str]) -> Iterator[str]:
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement} (the lock has {version})"


@pytest.mark.parametrize(("python", "machine"), PLACES)
def test_the_lock_meets_pyproject(python: str, machine: str) -> None:
    environment = place(python, machine)
    wanted = applying(asked(), environment)
    assert len(wanted) > 30
    for build in ("cpu", "cuda"):
        assert list(unmet(wanted, pins(environment, build))) == [], "run .ci/lock"


def test_the_lock_is_complete_without_a_resolver() -> None:
    """Of each package that is installed here in the locked version: what it needs is there too."""
    environment = default_environment()
    build = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    pinned, looked = pins(environment, build), set()
    queue = [(canonicalize_name(r.name), extra) for r in asked() for extra in ("", *r.extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in looked or _version(name) != pinned.get(name):
            continue
        looked.add((name, extra))
        wanted = applying([*map(Requirement, metadata.requires(name) or [])], environment, extra)
        assert list(unmet(wanted, pinned)) == [], f"{name}: run .ci/lock"
        queue += [(canonicalize_name(r.name), e) for r in wanted for e in ("", *r.extras)]
    assert looked, "nothing is installed in the locked versions: run .ci/lock"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_each_pin_has_its_hashes_and_no_place_is_named() -> None:
    for name, text in FILES.items():
        found = blocks(text)
        assert found and "://" not in text and "-index" not in text
        for pin, hashes in found:
            assert hashes and pin.url is None, f"{name}: {pin}"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), f"{name}: {pin}"


def test_only_the_cuda_file_has_anything_of_cuda() -> None:
    names = {file: [pin.name for pin, _ in blocks(text)] for file, text in FILES.items()}
    assert names["lock-cpu.txt"] == ["torch"] and "torch" in names["lock-cuda.txt"]
    assert not [n for n in names["lock.txt"] if n.startswith(("nvidia", "cuda", "triton", "torch"))]


def test_messages_name_what_the_extras_install() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name: [package] for name, package in EXTRAS.items()} == {n: extras[n] for n in EXTRAS}


# pip-audit's own output, shortened, where it knows the package and where it does not.
SAYS = """
import json, sys
lines = [line for a in sys.argv if a.endswith(".txt") for line in open(a) if "==" in line]
pins = [line.split()[0].split("==") for line in lines]
bad = {bad!r}
print(json.dumps({{"fixes": [], "dependencies": [
    {{"name": n, "version": v, "vulns": [{{"id": "PYSEC-1"}}] * (n in bad or n + v in bad)}}
    if bad else {{"name": n, "skip_reason": "Dependency not found on PyPI"}} for n, v in pins
]}}))
print("No known vulnerabilities found", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        ((), 3, "NOT AUDITED"),
        (("idna3.3",), 0, " 0 with known vulnerabilities"),
        (("idna3.3", "numpy"), 1, "PYSEC-1"),
    ],
)
def test_an_audit_that_nobody_answers_is_not_called_clean(
    tmp_path: Path, bad: tuple[str, ...], code: int, said: str
) -> None:
    """By a pip_audit that says what the real one said here, and where there is a service."""
    (tmp_path / "pip_audit.py").write_text(SAYS.format(bad=bad))
    command = [sys.executable, str(ROOT / ".ci/audit")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout, done.stderr
