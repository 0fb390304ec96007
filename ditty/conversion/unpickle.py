"""From pytorch_model.bin to safetensors, one tensor at a time, and nothing in it is run.

A .bin file is a pickle, which can run code when it is read. `torch.load(weights_only=True)` reads
tensors and refuses everything else; mapped, it takes memory for no more than what is looked at.
Files from before PyTorch 1.6 cannot be mapped, and are in memory whole, one at a time.
"""

import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditty.errors import ModelError
from ditty.models.shards import Parts, Piece, Progress, copy_beside, write_shards
from ditty.pretrained.modelfolder import pickled_files


def convert_pickled(source: Path, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write the model of a folder with .bin files into the existing folder `out`.

    Names, shapes, dtypes and values stay. What an earlier call that was killed has written is kept.

    Args:
        progress: called after each tensor with source bytes done, source bytes in all, and name.
    Returns:
        facts: tensors (how many), bytes, shards.
    Raises:
        ModelError: a file is damaged, or holds something else than tensors by name.
        StoreError: the disk has no room for the result.
    """
    pieces = [
        Piece(name, value.nbytes, value.nbytes, partial(_read, file, name))
        for file in pickled_files(source)
        for name, value in sorted(_open(file).items())
    ]
    names = [piece.name for piece in pieces]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(
            f"two files of {source} hold {twice[0]}: remove the one that does not count"
        )
    shards = write_shards(pieces, out, progress)
    shutil.copyfile(source / "config.json", out / "config.json")
    copy_beside(source, out)
    size = sum(piece.result_bytes for piece in pieces)
    return {"tensors": len(pieces), "bytes": size, "shards": shards}


def _read(file: Path, name: str) -> Parts:
    # Opened for each tensor: the pages of a mapping count as ours for as long as it is open.
    return {name: _open(file)[name].detach().clone(memory_format=torch.contiguous_format)}


def _open(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, mapped where it can be."""
    mapped = zipfile.is_zipfile(file)
    try:
        found = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a foreign file: unpickling raises whatever it meets
        first = str(error).strip().splitlines()[0] if str(error).strip() else "(no message)"
        raise ModelError(
            f"{file} cannot be read as weights alone: {type(error).__name__}: {first}. It is "
            "damaged, or holds more than tensors, which could run code: use a copy of the model "
            "in safetensors"
        ) from error
    wrong = [key for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ModelError(
            f"{file} holds {wrong[0]}, which is no tensor: expected the weights of a model by "
            "name, as save_pretrained wrote them (a checkpoint of a training is something else)"
        )
    return dict(found)
