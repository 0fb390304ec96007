"""What the stages of a base model write: by a worker process, or in a Pipeline's own."""

from functools import partial
from pathlib import Path
from typing import Any

from ditty.config.spec import ModelSpec, RunSpec
from ditty.models.shards import Progress
from ditty.pretrained import basemodel
from ditty.stages import share, stageline
from ditty.store.artifacts import Make, Store
from ditty.store.files import locked


def fetches(source: Path, progress: Progress | None = None) -> Make:
    """What makes a base model of a .gguf file, or of a folder with .bin files.

    It goes on where a killed one has stopped.
    """
    if source.is_dir():
        from ditty.conversion.unpickle import convert_pickled

        return partial(convert_pickled, source, progress=progress)
    from ditty.conversion.convert import convert_gguf

    return partial(convert_gguf, source, progress=progress)


def quantizes(
    source: Path, model: ModelSpec, dtype: str, device: str, progress: Progress | None = None
) -> Make:
    """What fills the folder of a quantized base model; goes on where a killed one has stopped.

    Args:
        source: the base model's folder.
        dtype: see ditty.quantization.quantize.quantize.
        device: "cpu" or "cuda".
    """

    def make(out: Path) -> dict[str, Any]:
        from ditty.quantization.quantize import quantize

        return quantize(
            source,
            out,
            model.quantization,
            dtype,
            progress=progress,
            device=device,
            trust_remote_code=model.trust_remote_code,
        )

    return make


def base_folder(base: basemodel.BaseModelRef, spec: RunSpec, store: Store) -> Path:
    """The base model's folder, made in this process where it is not there.

    Raises:
        DittyError: it cannot be had.
    """
    ref = stageline.resolve_model(spec, store).only("fetch")
    if ref is None:  # a folder
        return Path(base.name)
    with locked(store.lock(ref.stage, ref.key).path):
        found = basemodel.locate(base, store)
        if found is not None:
            return found
        if base.kind is basemodel.Kind.HUB:
            folder, pickled = basemodel.fetch(base, store), basemodel.pickled_snapshot(base)
            if pickled is None:
                return folder
            base, ref = pickled, stageline.convert_ref(pickled)
        _build(ref, store, fetches(Path(base.name)))
    return store.path(ref.stage, ref.key)


def quantized_folder(source: Path, spec: RunSpec, store: Store, device: str) -> Path:
    """The quantized twin of the base model in `source`, made in this process where it is not there.

    Raises:
        DittyError: it cannot be made.
    """
    ref = stageline.resolve_model(spec, store).need("prequantize")
    with locked(store.lock(ref.stage, ref.key).path):
        make = quantizes(source, spec.model, stageline.base_dtype(spec), device)
        _build(ref, store, make)
    return store.path(ref.stage, ref.key)


def _build(ref: stageline.StageRef, store: Store, make: Make) -> None:
    facts = {"stage": ref.stage, "inputs": ref.inputs}
    build = partial(store.build, ref.stage, ref.key, facts, make, resumable=True)
    share.made(ref, store, build)
