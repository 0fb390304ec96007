"""A flow of one cached stage that counts how often its body ran.

`python counted_flow.py HOME KEY COUNTER SECONDS` runs it in a process of its own and prints the
state of its task.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefect import flow, task

from ditty.store.artifacts import Store
from flows.caching import cached, reference


@task
def build(ref: Any, home: Path, counter: Path, seconds: float) -> Any:
    """Commit an artifact with one file; appends a byte to `counter` each time it runs."""
    with counter.open("ab") as file:
        file.write(b"x")
    time.sleep(seconds)
    store = Store(home)
    if not store.find(ref.stage, ref.key):
        with store.commit(ref.stage, ref.key, {}) as out:
            (out / "data").write_text(f"rows of {ref.key}")
    manifest = store.find(ref.stage, ref.key)
    assert manifest
    return reference(ref, manifest)


def run_stage(key: str, home: Path, counter: Path, seconds: float = 0) -> Any:
    """The task's final state's name, and its result."""
    ref: Any = SimpleNamespace(stage="load", key=key)
    state = cached(build, Store(home))(ref, home, counter, seconds, return_state=True)
    return state.name, state.result()


one_stage = flow(name="one-stage", validate_parameters=False)(run_stage)


if __name__ == "__main__":
    home, key, counter, seconds = sys.argv[1:]
    print(one_stage(key, Path(home), Path(counter), float(seconds))[0])
