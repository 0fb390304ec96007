"""What a text that names files means, and which file was probably meant."""

import difflib
import glob
from pathlib import Path


def is_glob(source: str) -> bool:
    """Whether a path names several files by a pattern."""
    return glob.has_magic(source)


def nearest(path: Path) -> str:
    """A hint at the file that was probably meant."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
