"""`ditty logs`: which attempt, what of its bytes, and following it to the run's end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ditty.runs.logs import Attempt, Event, Line, LoggedStage, NoLog, read_logs
from ditty.runs.rundir import RunDir
from ditty.worker import STAGES
from tests.processes import ROOT, Command, Holder

COMMAND = "from flows.commands.cli import main; main()"


@pytest.fixture
def run(home: Path) -> RunDir:
    found = RunDir.named("demo", home)
    found.root.mkdir(parents=True)
    return found


def new_attempt(run: RunDir, stage: str, began: int, content: bytes | None = b"") -> Path:
    """An attempt that began at `began` seconds; returns its log. None: it has none yet."""
    attempt = run.new_attempt(stage)
    (attempt / "job.json").write_text("{}")
    os.utime(attempt / "job.json", (began, began))
    if content is not None:
        (attempt / "log.txt").write_bytes(content)
    return attempt / "log.txt"


def told(event: Event) -> str:
    """An event as a word: `stage/attempt` or the line."""
    if isinstance(event, Attempt):
        return f"{event.stage}/{event.directory.name}"
    return event.text if isinstance(event, Line) else "no log"


def follow(run: RunDir, waits: list[Callable[[], object]]) -> list[str]:
    """What following tells; at each wait, noted as `...`, the next of `waits` happens."""
    seen: list[str] = []
    left = iter(waits)

    def wait() -> None:
        seen.append("...")
        next(left)()

    for event in read_logs(run, wait=wait):
        seen.append(told(event))
    assert next(left, None) is None, f"it ended before all had happened: {seen}"
    return seen


def test_the_newest_attempt_of_the_stage_that_began_last(run: RunDir) -> None:
    new_attempt(run, "train", 100, b"old\n")
    new_attempt(run, "train", 300, b"again\n")
    for began in (110, 120, 200):
        new_attempt(run, "prequantize", began, b"quantized at %d\n" % began)
    new_attempt(run, "train", 400, None)
    assert [told(e) for e in read_logs(run)] == ["train/0002", "again"]
    of_stage = read_logs(run, LoggedStage.PREQUANTIZE)
    assert [told(e) for e in of_stage] == ["prequantize/0003", "quantized at 200"]
    assert list(read_logs(run, LoggedStage.FETCH)) == [NoLog()]
    assert set(LoggedStage) == set(STAGES) - {"bench"}  # which is no part of a run


def test_no_byte_of_a_log_reaches_the_terminal_as_a_control(run: RunDir) -> None:
    content = b"\x1b[31mred\x1b]0;title\x07 \xff\xfe b\xc3\xa4r\t|\r\n 10%\r 99%\n\xc2\x9b2Jend"
    new_attempt(run, "train", 1, content)
    assert [told(e) for e in read_logs(run)][1:] == [
        "\\x1b[31mred\\x1b]0;title\\x07 \ufffd\ufffd bär\t|",
        " 99%",
        "\\x9b2Jend",
    ]


def test_it_is_followed_through_a_retry_and_into_another_stage(run: RunDir) -> None:
    first = new_attempt(run, "prequantize", 1, b"one\n")

    def retry() -> None:
        flow.append(first, "cut sh")
        new_attempt(run, "prequantize", 2, b"better\n")

    with Holder(run.flow_lock, shared=True) as flow:
        seen = follow(
            run,
            [
                lambda: flow.append(first, "tw"),
                lambda: flow.append(first, "o\nthree"),
                lambda: flow.append(first, "\n"),
                retry,
                lambda: new_attempt(run, "train", 3, b"step 1\n"),
                flow.kill,
            ],
        )
    assert seen == [
        *("prequantize/0001", "one", "...", "...", "two", "...", "three", "..."),
        *("cut sh", "prequantize/0002", "better", "..."),
        *("train/0001", "step 1", "..."),
    ]


def test_a_training_that_saves_after_its_flow_died_is_followed(run: RunDir) -> None:
    log = new_attempt(run, "train", 1)
    with Holder(run.flow_lock, shared=True) as flow, Holder(run.root / "lock") as training:

        def save() -> None:
            training.append(log, "saved\n")
            training.kill()

        assert follow(run, [flow.kill, save]) == ["train/0001", "...", "...", "saved"]


def test_a_run_without_a_log_is_waited_for_until_it_ends(run: RunDir) -> None:
    assert list(read_logs(run)) == [NoLog()]
    with Holder(run.flow_lock, shared=True) as flow:
        assert follow(run, [lambda: None, flow.kill]) == ["no log", "...", "..."]
    first = lambda: new_attempt(run, "train", 1, b"begun\n")  # noqa: E731
    assert follow(run, [lambda: None, first]) == ["no log", "...", "...", "train/0001", "begun"]
    assert follow(run, []) == ["train/0001", "begun"]


def test_the_command_follows_until_the_run_has_ended(run: RunDir, home: Path) -> None:
    with (
        Holder(run.flow_lock, shared=True) as flow,
        Command("logs", "demo", "-f", DITTY_HOME=str(home)) as command,
    ):
        assert "run demo has no log yet" in command.until("waiting")
        log = new_attempt(run, "train", 1, b"begun\n")
        command.until("begun\n")
        flow.append(log, "[bold]done[/] \x1b[2J :smile:\n")
        command.until("done")
        flow.kill()
        code, text = command.end()
    assert code == 0
    assert text.splitlines()[1:] == [
        f"── train 0001: {log}",
        "begun",
        "[bold]done[/] \\x1b[2J :smile:",
    ]


def test_ctrl_c_is_the_end_of_following(run: RunDir, home: Path) -> None:
    new_attempt(run, "train", 1, b"begun\n")
    with (
        Holder(run.flow_lock, shared=True),
        Command("logs", "demo", "--follow", DITTY_HOME=str(home)) as command,
    ):
        command.until("begun")
        command.process.send_signal(signal.SIGINT)
        code, text = command.end()
    assert code == 0 and text.endswith("begun\n")


def test_head_may_close_the_pipe(run: RunDir, home: Path) -> None:
    new_attempt(run, "train", 1, b"a line of the log\n" * 100_000)
    script = '"$0" -c "$1" logs demo | head -n 2; echo "${PIPESTATUS[0]}"'
    ended = subprocess.run(
        ["bash", "-c", script, sys.executable, COMMAND],
        cwd=ROOT,
        env={**os.environ, "DITTY_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[1:] == ["a line of the log", "0"]


def test_an_unknown_run_or_stage_is_said(run: RunDir, home: Path) -> None:
    for words in (["logs", "dmeo"], ["status", "dmeo"], ["status", "dmeo", "-w"]):
        with Command(*words, DITTY_HOME=str(home)) as command:
            code, text = command.end()
        assert code == 1
        assert " ".join(text.split()) == (
            f"error there is no run dmeo in {home} (DITTY_HOME); did you mean demo? Start one with "
            "`ditty run SPEC`, or set DITTY_HOME to where it ran"
        )
    with Command("logs", "demo", "--stage", "../train", DITTY_HOME=str(home)) as command:
        code, text = command.end()
    assert code == 2 and "'fetch', 'prequantize', 'train', 'evaluate'" in text
