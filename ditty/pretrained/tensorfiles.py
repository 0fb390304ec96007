"""What the safetensors files of a model say of their tensors; no weights are read.

Imports neither torch nor transformers.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ditty.errors import ModelError
from ditty.pretrained.modelfolder import weight_files
from ditty.store.readahead import Span


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor.

    Attributes:
        span: where its bytes lie.
        dtype: as safetensors spells it, e.g. BF16.
    """

    file: Path
    name: str
    shape: list[int]
    span: Span
    dtype: str


def headers(source: Path) -> Iterator[Header]:
    """The tensors of a checkpoint, by file and name; no weights are read.

    Source: the safetensors format: an 8-byte length, that much JSON, and the tensors' bytes.
    """
    for file in weight_files(source):
        size = file.stat().st_size
        try:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > size:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            spans = {name: entry["data_offsets"] for name, entry in sorted(entries.items())}
            expected = 8 + length + max((end for _, end in spans.values()), default=0)
            if size != expected:
                raise ValueError(f"{size} bytes, expected {expected}")
            for name, (begin, end) in spans.items():
                shape, dtype = list(entries[name]["shape"]), str(entries[name]["dtype"])
                yield Header(file, name, shape, Span(file, 8 + length + begin, end - begin), dtype)
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file} is damaged or no safetensors file ({error}): copy or download it again"
            ) from error
