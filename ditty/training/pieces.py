"""Tensors in pieces: each file holds ranges of flattened tensors, any range can be read back.

Written by however many processes, read by however many others, who may have cut otherwise. The
files are safetensors: nothing in them is code, and what wrote them does not matter.

    shard_00000.safetensors     "<name>@<first element>": [elements]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditty.errors import RunMismatch
from ditty.failpoints import fail_point


def piece_name(name: str, start: int) -> str:
    """The key of the range of `name` that begins with element `start`."""
    return f"{name}@{start}"


def write_pieces(path: Path, pieces: Mapping[str, torch.Tensor]) -> None:
    """Write flat CPU tensors by piece name; no file where there are none."""
    if pieces:
        fail_point("write", path)
        save_file(dict(pieces), path)


@dataclass(frozen=True)
class Piece:
    """Where a range lies: under `key` in an open safetensors file."""

    start: int
    stop: int
    file: Any
    key: str


class Pieces:
    """What the shard files of a folder hold; they are open for as long as this is there.

    To open one reads the names of all its tensors: once a file, and not once a tensor.

    Args:
        folder: a committed, verified directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.by_name: dict[str, list[Piece]] = {}
        for file in sorted(folder.glob("shard_*.safetensors")):
            opened = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118
                name, _, start = key.rpartition("@")
                size = torch.Size(opened.get_slice(key).get_shape()).numel()
                piece = Piece(int(start), int(start) + size, opened, key)
                self.by_name.setdefault(name, []).append(piece)

    def names(self, prefix: str) -> set[str]:
        """The tensors whose names begin with `prefix`, without it."""
        return {n.removeprefix(prefix) for n in self.by_name if n.startswith(prefix)}

    def size(self, name: str) -> int:
        """Elements of `name`, all pieces together."""
        return max(piece.stop for piece in self.by_name[name])

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor `name`.

        Raises:
            RunMismatch: the files do not hold all of them.
        """
        result: torch.Tensor | None = None
        found = 0
        for piece in self.by_name.get(name, ()):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first >= last:
                continue
            part = piece.file.get_slice(piece.key)[first - piece.start : last - piece.start]
            if result is None:
                result = torch.empty(stop - start, dtype=part.dtype)
            result[first - start : last - start] = part
            found += last - first
        if result is None or found != stop - start:
            raise RunMismatch(
                f"{self.folder} holds {found} of the {stop - start} elements of {name} from "
                f"{start} on: it was saved by another version of ditty, or for another model"
            )
        return result

    def first(self, name: str) -> torch.Tensor:
        """Any one piece of `name`, whole: of a value that is the same in all."""
        piece = self.by_name[name][0]
        tensor: torch.Tensor = piece.file.get_tensor(piece.key)
        return tensor

    def length(self, name: str, start: int) -> int | None:
        """Elements of the piece of `name` that begins with element `start`, or None."""
        return next((p.stop - p.start for p in self.by_name[name] if p.start == start), None)

    def read_exact(self, name: str, start: int) -> torch.Tensor | None:
        """The piece of `name` that begins with element `start`, whole, or None."""
        for piece in self.by_name.get(name, ()):
            if piece.start == start:
                tensor: torch.Tensor = piece.file.get_tensor(piece.key)
                return tensor
        return None
