"""A model's folder, written piece by piece: shards with their index, and the files beside them.

In the memory of one shard and what making one of its pieces takes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditty.errors import StoreError
from ditty.files import write_json
from ditty.modelfolder import INDEX, WEIGHTS, tokenizer_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 512 << 20  # of one file; a larger piece gets a file of its own
SPARE_BYTES = 64 << 20  # of disk, beyond the result
COPIED = ("generation_config.json", "*.py")

Progress = Callable[[int, int, str], None]
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """What is written in place of one tensor of a source.

    Attributes:
        name: the source's name for it.
        source_bytes, result_bytes: sizes on disk; the latter is exact or slightly too large.
        make: reads the source; the tensors to write, by name, none of them a view of another.
    """

    name: str
    source_bytes: int
    result_bytes: int
    make: Callable[[], Parts]


def write_shards(pieces: Sequence[Piece], out: Path, progress: Progress | None = None) -> int:
    """Make and write the pieces in their order, with an index if there are several files.

    Args:
        out: an existing folder.
        progress: called after each piece with source bytes done, source bytes in all, and name.
    Returns:
        how many files that were.
    Raises:
        StoreError: the disk has no room for all of them; nothing is written.
    """
    _check_disk(out, sum(piece.result_bytes for piece in pieces))
    shards = _split(pieces)
    total = sum(piece.source_bytes for piece in pieces)
    done = size = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = WEIGHTS if len(shards) == 1 else several
        content: Parts = {}
        for piece in shard:
            content.update(piece.make())
            done += piece.source_bytes
            if progress is not None:
                progress(done, total, piece.name)
        save_file(content, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, file))
        size += sum(value.nbytes for value in content.values())
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return len(shards)


def weight_bytes(folder: Path) -> int:
    """What the weights of a folder take on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_beside(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and code; not config.json.

    Raises:
        ModelError: `source` has no tokenizer.
    """
    for path in [*tokenizer_files(source), *_existing(source, COPIED)]:
        shutil.copyfile(path, out / path.name)


def _check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + SPARE_BYTES:
        raise StoreError(
            f"{out} has {free / 1e9:.1f} GB free, the model that is written there needs "
            f"{(needed + SPARE_BYTES) / 1e9:.1f} GB: free some, or set DITTY_HOME to another disk"
        )


def _split(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Consecutive pieces of at most SHARD_BYTES together, or a single larger one."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.result_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(piece)
        room -= piece.result_bytes
    return shards


def _existing(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))
