"""The real demo, on the real model: mark `slow` (half an hour on 2 cores).

python -m pytest -m slow -o addopts= tests/test_demo.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, kill_when
from tests.test_kills import adapter_hash, committed, moments

pytestmark = pytest.mark.slow

DEMO = "import sys; sys.argv = ['ditty', 'demo']; from flows.commands.cli import main; main()"


def start_demo(home: Path, output: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "DITTY_HOME": str(home)}
    with open(output, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", DEMO], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def test_the_demo_killed_at_five_moments_ends_like_an_undisturbed_one(tmp_path, capsys):
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "output.txt"
    assert start_demo(undisturbed, output).wait() == 0
    home = tmp_path / "killed"
    kept: dict[str, int] = {}
    for moment, happens in moments(home, home / "uploads").items():
        kill_when(start_demo(home, output), happens)
        now = committed(home)
        assert {path: now.get(path) for path in kept} == kept, f"{moment}: a stage was made again"
        kept = now
        with capsys.disabled():
            print(f"killed in {moment}: {len(kept)} artifacts are committed")
    assert start_demo(home, output).wait() == 0
    after = committed(home)
    assert {path: after[path] for path in kept} == kept
    with capsys.disabled():
        print(f"adapters: {adapter_hash(home)} and {adapter_hash(undisturbed)}")
    assert adapter_hash(home) == adapter_hash(undisturbed)
