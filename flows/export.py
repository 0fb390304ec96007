"""The flow `export`: the result of a run, copied to where it is used."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from ditty import stages
from ditty.artifacts import Store
from ditty.errors import RunError
from ditty.files import read_json
from ditty.remote import Remote
from ditty.spec import RunSpec
from ditty.status import find_run
from flows import tasks
from flows.frame import framed
from flows.mirror import fetch_result
from flows.tasks import Caller


@flow(name="export", flow_run_name="{run}", retries=0, persist_result=False)
def export(run: str, out: str) -> dict[str, Any]:
    """Copy the result of a run to `out`: an adapter in peft's layout, or a whole model.

    The copy is verified file by file, and a copy that was cut short goes on where it was.

    Args:
        run: The run's name.
        out: A folder that is made, or `s3://bucket/prefix/name`.

    Returns:
        {"run", "out": where it is now, a url, "digest": SHA-256 of its content}
    Raises:
        RunError: there is no such run, or it has no result.
        RemoteError: another content is there already, or the place cannot be reached.
    """
    store = Store()
    directory = find_run(store, run)
    spec = RunSpec.model_validate(read_json(directory.spec_file))
    key = (read_json(directory.trained_file) or {}).get("train")

    def copy(call: Caller) -> dict[str, Any]:
        if not key or not _is_here(spec, store, key):
            raise RunError(
                f"run {run} has no result in {store.home}: run its spec (what is there is not made "
                "again), then export it"
            )
        url = out if "://" in out else Path(out).expanduser().absolute().as_uri()
        digest = call(tasks.export, stages.export_ref(key, url.rstrip("/")), store)
        return {"run": run, "out": url, "digest": digest}

    return framed(Caller.of(spec, store), copy)


def _is_here(spec: RunSpec, store: Store, key: str) -> bool:
    if store.find("train", key):
        return True
    url = spec.upload.url
    return url is not None and fetch_result(store, Remote(url), spec.name, key, get_run_logger())
