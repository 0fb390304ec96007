"""The flow `quantize`: a base model, quantized once, and copied to where it is used."""

import re
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import RunSpec
from ditty.config.specfile import parse_spec
from ditty.errors import SpecError
from ditty.planning import preflight
from ditty.pretrained import basemodel
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store, read_manifest
from ditty.store.files import locked
from flows import line
from flows.frame import framed
from flows.place import checked_place, copy_to
from flows.tasks import Caller


def _run_name() -> str:
    parameters = flow_run.parameters
    return f"quantize {parameters['model']} to {parameters['to']}"


@flow(name="quantize", flow_run_name=_run_name, retries=0, persist_result=False)
def quantize(
    model: str,
    to: Quantization = Quantization.NF4,
    out: str | None = None,
    precision: Precision = Precision.BF16,
    revision: str | None = None,
) -> dict[str, Any]:
    """A base model in a quantized format, as a training with `model.quantization` loads it.

    A spec with the same model, format and precision finds it made. One that was killed goes on at
    the first shard that is missing.

    Args:
        model: Hub id, folder with safetensors or .bin files, or .gguf file.
        to: The format.
        out: A folder that is made, `s3://bucket/prefix/name`, or `hub:ORG/NAME`; without it, the
            result stays in the store.
        precision: What its layers compute in, and what is not quantized is kept in.
        revision: Commit, branch or tag of a hub model.

    Returns:
        {"path": in the store, "out": the url of the copy or None, "digest": SHA-256 of its content,
        "bytes": of its weights}
    Raises:
        SpecError: `to` is `none`.
        ModelError: the model cannot be quantized.
        DittyError: what else stopped it.
    """
    spec = _spec(model, to, precision, revision)
    return framed(Caller.of(spec, Store()), lambda call: _made(call, out))


def _made(call: Caller, out: str | None) -> dict[str, Any]:
    """What `quantize` returns, once it is so."""
    spec, store = call.spec, call.store
    preflight.check_store(store)
    preflight.check_places()
    url = checked_place(out)
    base = line.fetched(call, stageline.resolve_model(spec, store), stageline.resolve_model)
    assert base.model_dir is not None, "the base model was fetched"
    basemodel.check_folder(base.model_dir, quantize=True)
    run = RunDir.named(spec.name, store.home)
    with locked(run.flow_lock, shared=True):
        path, _ = line.base_model(call, base)
    if url is not None:
        copy_to(call, base.need("prequantize"), url)
    manifest = read_manifest(path)
    return {
        "path": str(path),
        "out": url,
        "digest": manifest.digest,
        "bytes": manifest.facts["bytes"],
    }


def _spec(model: str, to: Quantization, precision: Precision, revision: str | None) -> RunSpec:
    """A spec whose stages of the model are those wanted; its data are never looked at."""
    if to is Quantization.NONE:
        raise SpecError("--to: got none, which quantizes nothing: expected nf4 or int8")
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2])
    values = {
        "name": f"quantize-{short}-{to}",
        "data": {"source": "none.jsonl"},
        "model": {"base_model": model, "revision": revision, "quantization": to},
        "train": {"precision": precision},
    }
    return parse_spec(values, where="quantize")
