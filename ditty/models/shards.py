"""A model's folder, written piece by piece: shards with their index, and the files beside them.

One shard is made while the one before it is written and another hashed, and a shard that stands is
never made again: the memory of two shards, or of one where it is a single larger piece, and of what
making a piece takes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditty.errors import StoreError
from ditty.failpoints import fail_point
from ditty.pretrained.modelfolder import INDEX, WEIGHTS, tokenizer_files
from ditty.store.files import fsync_path, read_json, rename, sha256_once, unlink, write_json
from ditty.store.readahead import Span, read_ahead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 256 << 20  # of one file; a larger piece gets a file of its own
WRITERS = 2  # shards that are written or hashed at once; one hashes slower than a disk writes
IN_MEMORY = 2  # shards: one that is made, and one that is not yet the kernel's to write
SPARE_BYTES = 64 << 20  # of disk, beyond the result
COPIED = ("generation_config.json", "*.py")
PLAN = "shards.json"  # which tensors of the source each file is made of; there before they are

Progress = Callable[[int, int, str], None]
Parts = dict[str, torch.Tensor]


@contextmanager
def tensor_of(file: Path, name: str) -> Iterator[torch.Tensor]:
    """One tensor of a safetensors file, a view of it: copy what is kept before the block ends."""
    # Opened for each tensor: the pages of a mapping count as ours for as long as it is open.
    with safe_open(file, framework="pt") as opened:
        yield opened.get_tensor(name)


@dataclass(frozen=True)
class Piece:
    """What is written in place of one tensor of a source.

    Attributes:
        name: the source's name for it.
        source_bytes, result_bytes: sizes on disk; the latter is exact or slightly too large.
        make: reads the source; the tensors to write, by name, on the CPU, none of them a view of
            another.
        source: where the source's bytes lie, where that is known.
    """

    name: str
    source_bytes: int
    result_bytes: int
    make: Callable[[], Parts]
    source: Span | None = None


@dataclass(frozen=True)
class Shard:
    """One file of the result.

    Attributes:
        path: appears by a rename, after all of it is on the disk.
        pieces: what it is made of.
    """

    path: Path
    pieces: list[Piece]

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        return sum(piece.source_bytes for piece in self.pieces)

    @property
    def result_bytes(self) -> int:
        """What it takes on disk, exact or slightly too large."""
        return sum(piece.result_bytes for piece in self.pieces)

    @property
    def plan(self) -> list[list[Any]]:
        """What it is made of, for `PLAN`."""
        return [[piece.name, piece.source_bytes, piece.result_bytes] for piece in self.pieces]

    def stands(self) -> bool:
        """Whether it is there, whole, from an earlier attempt."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return bool(file.keys())
        except (OSError, SafetensorError):
            return False

    @property
    def memory(self) -> int:
        """How many of IN_MEMORY it counts for: a large piece is alone."""
        return IN_MEMORY if self.result_bytes > SHARD_BYTES else 1

    def write(self, content: Parts, written: Callable[[], None]) -> None:
        """Put it on the disk, then give it its name.

        Args:
            content: is emptied before `written` is called: memory is free while the disk works.
        """
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            try:
                fail_point("write", self.path)
                save_file(content, temporary, metadata={"format": "pt"})
            finally:
                content.clear()
                written()
            fsync_path(temporary)
            rename(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(self.path.parent)
        sha256_once(self.path)  # for the manifest, while the next shard is made


def write_shards(pieces: Sequence[Piece], out: Path, progress: Progress | None = None) -> int:
    """Make and write the pieces in their order, with an index if there are several files.

    Args:
        out: an existing folder. Shards of the same pieces that an earlier call, however it ended,
            has left there are kept.
        progress: called after each piece with source bytes done, source bytes in all, and name.
    Returns:
        how many files there are.
    Raises:
        StoreError: the disk has no room for what is missing; nothing is written.
    """
    shards = _split(pieces, out)
    plan = {shard.path.name: shard.plan for shard in shards}
    _remove_stale(plan, out)
    missing = [shard for shard in shards if not shard.stands()]
    check_disk(out, sum(shard.result_bytes for shard in missing))
    write_json(out / PLAN, plan)
    total = sum(piece.source_bytes for piece in pieces)
    done = total - sum(shard.source_bytes for shard in missing)
    _read_ahead(missing[:1])
    with _Writer() as writer:
        for number, shard in enumerate(missing, start=1):
            _read_ahead(missing[number : number + 1])
            writer.make_room(shard)
            content: Parts = {}
            for piece in shard.pieces:
                content.update(piece.make())
                done += piece.source_bytes
                if progress is not None:
                    progress(done, total, piece.name)
            writer.write(shard, content)
    if len(shards) > 1:
        _write_index(shards, out)
    return len(shards)


def _read_ahead(soon: list[Shard]) -> None:
    read_ahead(piece.source for shard in soon for piece in shard.pieces if piece.source)


def _remove_stale(plan: dict[str, Any], out: Path) -> None:
    """What an earlier call has left behind, of another plan, or half a file."""
    stale = [*out.glob(".*.tmp")]
    if read_json(out / PLAN) != plan:
        stale += out.glob("*.safetensors")
    for path in stale:
        unlink(path)


class _Writer:
    """Writes shards in WRITERS threads, while its user makes the next, of IN_MEMORY."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="ditty shards")
        self._under_way: list[Future[None]] = []
        self._room = Semaphore(IN_MEMORY)

    def __enter__(self) -> "_Writer":
        return self

    def make_room(self, shard: Shard) -> None:
        """Wait until there is memory to make `shard`; raises what has failed of those before."""
        for _ in range(shard.memory):
            self._room.acquire()
        for done in [future for future in self._under_way if future.done()]:
            self._under_way.remove(done)
            done.result()

    def write(self, shard: Shard, content: Parts) -> None:
        """Begin to write a shard, for which room was made."""

        def written() -> None:
            self._room.release(shard.memory)

        self._under_way.append(self._pool.submit(shard.write, content, written))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._under_way:
                future.result()


def _write_index(shards: list[Shard], out: Path) -> None:
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            weight_map.update(dict.fromkeys(file.keys(), shard.path.name))  # noqa: SIM118
    size = weight_bytes(out)
    write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


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


def check_disk(out: Path, needed: int) -> None:
    """Raise StoreError unless the disk of `out` has room for so many bytes."""
    free = shutil.disk_usage(out).free
    if free < needed + SPARE_BYTES:
        raise StoreError(
            f"{out} has {free / 1e9:.1f} GB free, the model that is written there needs "
            f"{(needed + SPARE_BYTES) / 1e9:.1f} GB: free some, or set DITTY_HOME to another disk"
        )


def _split(pieces: Sequence[Piece], out: Path) -> list[Shard]:
    """Consecutive pieces of at most SHARD_BYTES together, or a single larger one."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.result_bytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(piece)
        room -= piece.result_bytes
    if len(groups) == 1:
        return [Shard(out / WEIGHTS, groups[0])]
    return [
        Shard(out / f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _existing(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))
