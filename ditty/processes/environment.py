"""What a stage's processes inherit, and where they compute. Without torch.

The environment of a child is an allow-list, what the spec names, and what ditty sets itself.
"""

import math
import os
import re
import subprocess
from pathlib import Path

from ditty.config.choices import Device, Where
from ditty.config.launchspec import LaunchSpec
from ditty.errors import SpecError
from ditty.processes.machines import (
    HOST_VARIABLE,
    PORT_VARIABLE,
    RANK_VARIABLE,
    resolve_machines,
)

MARGIN_SECONDS = 5.0  # after the grace, for the SIGKILLs of ditty.processes.guard

DEVICE_FILES = Path("/dev")
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")

# What a child inherits. Everything else in the launching process's environment stays there:
# credentials of clouds (AWS_*: training uploads nothing), of Prefect (PREFECT_*), of trackers.
# Leftovers of another launch stay there too, for they change ours in silence: ACCELERATE_* and
# FSDP_* (accelerate's switches), RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*, TORCHELASTIC_* (an outer
# torchrun), SLURM_*, PMI_*, OMPI_* (accelerate guesses a world size from some of them).
INHERITED = frozenset(
    # A process on POSIX: programs, home, user name (torch names its caches by it), locale, scratch.
    ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_CACHE_HOME")
    # The interpreter and its libraries: the same ones as here. LD_PRELOAD: an allocator.
    + ("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD")
    + ("PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONIOENCODING")
    + ("PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    # The compiler that Triton and inductor call.
    + ("CC", "CXX")
    # The way to the hub through a proxy and a private certificate authority.
    + ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    + ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    + ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    # The hub's names from before HF_*.
    + ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE")
)
INHERITED_PREFIXES = (
    # Locale.
    "LC_",
    # Which GPUs, how they talk, how their memory is managed, what the kernels may do.
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "CUBLAS_", "CUDNN_"),
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "BNB_"),
    # Where CPU threads run; how many is ours to say, see NEVER_INHERITED.
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"),
    # The hub: cache folders, endpoint, offline mode, and HF_TOKEN, since a stage may read a gated
    # model or data set. TRANSFORMERS_*: offline mode and verbosity by their older names.
    *("HF_", "TRANSFORMERS_"),
    # Ours.
    "DITTY_",
)
# They would beat OMP_NUM_THREADS.
NEVER_INHERITED = frozenset(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"))
# What says something about this machine alone: its GPUs, its scratch, its place among several.
OF_THIS_MACHINE = frozenset(
    ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR")
    + (RANK_VARIABLE, HOST_VARIABLE, PORT_VARIABLE)
)
# A spec that names these would contradict its own keys.
SET_BY_KEYS = {
    "OMP_NUM_THREADS": "launch.threads",
    "MKL_NUM_THREADS": "launch.threads",
    "OPENBLAS_NUM_THREADS": "launch.threads",
    "ACCELERATE_USE_CPU": "launch.device",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "launch.grace_seconds",
}


def child_environment(launch: LaunchSpec) -> dict[str, str]:
    """The whole environment of a stage's processes: an allow-list, and what ditty sets itself.

    Raises:
        SpecError: see `inherited_environment`; or the device is not there; or there are several
            machines, and this one does not know its place.
    """
    inherited = inherited_environment(launch)
    named = {name: inherited[name] for name in launch.environment if not _is_inherited(name)}
    return {**inherited, **_settings(launch), **_own_sources(), **named}


def inherited_environment(launch: LaunchSpec) -> dict[str, str]:
    """What of this process's environment its children get: an allow-list, and what the spec names.

    Raises:
        SpecError: `launch.environment` names a variable that is not set, or one that a key of
            `launch` decides.
    """
    inherited = {name: value for name, value in os.environ.items() if _is_inherited(name)}
    for name in launch.environment:
        if name in SET_BY_KEYS:
            raise SpecError(
                f"launch.environment names {name}, which ditty sets itself: remove it, and use "
                f"{SET_BY_KEYS[name]}"
            )
        if name not in os.environ:
            raise SpecError(
                f"launch.environment names {name}, which is not set in the environment of this "
                "process: export it before the start, or remove it from the spec"
            )
        inherited[name] = os.environ[name]
    return inherited


def environment_elsewhere(launch: LaunchSpec) -> dict[str, str]:
    """The same for a process on another machine, which sets what depends on the machine.

    Raises:
        SpecError: see `inherited_environment`.
    """
    inherited = {**inherited_environment(launch), **_own_sources()}
    return {name: value for name, value in inherited.items() if name not in OF_THIS_MACHINE}


def _is_inherited(name: str) -> bool:
    allowed = name in INHERITED or name.startswith(INHERITED_PREFIXES)
    return allowed and name not in NEVER_INHERITED


def _settings(launch: LaunchSpec) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    settings = {
        "OMP_NUM_THREADS": str(launch.threads or max(1, cores // launch.num_processes)),
        # Parallelism comes from processes; the tokenizer's threads and fork() do not go together.
        "TOKENIZERS_PARALLELISM": "false",
        # The log is followed while it is written, and a crash in C leaves its Python stack there.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # torchrun kills its ranks so many whole seconds after SIGTERM: not before the guard does.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(launch.grace_seconds + MARGIN_SECONDS)),
    }
    if resolve_device(launch) == Device.CPU:
        # The first is for accelerate, which else makes two runs of one rank of a launch of two; the
        # second for the rest: no CUDA context, and none of a GPU's memory.
        settings |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if launch.num_machines > 1:
        resolve_machines(launch)  # whoever asks before the start is to hear what is missing
        # Ranks on a TCP store of their own: keys of a world that is lost cannot meet the next one.
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return settings


def _own_sources() -> dict[str, str]:
    """The way to a source tree that this process found by other means than PYTHONPATH."""
    root = Path(__file__).absolute().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return {}
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def resolve_device(launch: LaunchSpec) -> str:
    """Where the processes of this launch compute: "cpu" or "cuda"; found without torch.

    Raises:
        SpecError: a GPU of this machine is asked for and none is visible, or fewer than processes.
    """
    if launch.device is Device.CPU:
        return Device.CPU.value
    if launch.backend is not Where.LOCAL:
        return launch.device.value  # each machine of the job looks at its own
    gpus = _visible_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    if gpus == 0:
        if launch.device is Device.AUTO:
            return Device.CPU.value
        raise SpecError(
            f"launch.device: cuda, but no NVIDIA GPU is visible on this machine{where}: "
            "expected /dev/nvidia0; use device: auto or cpu, or look at `nvidia-smi`"
        )
    if launch.num_processes > gpus:
        raise SpecError(
            f"launch.num_processes: {launch.num_processes}, but {gpus} GPU(s) are visible{where}: "
            f"one process drives one GPU, so use at most {gpus}, or device: cpu"
        )
    return Device.CUDA.value


def gpu_bytes() -> float | None:
    """Memory of the machine's smallest NVIDIA GPU, in bytes; None where its driver does not say."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(line) for line in told.split()) * (1 << 20)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _visible_gpus() -> int:
    """How many GPUs CUDA would show, by its rules for CUDA_VISIBLE_DEVICES.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables": entries after the first
    invalid one are invisible, and a repeated one makes all invisible.
    """
    files = [p for p in DEVICE_FILES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    physical = len(files) or (len(list(DRIVER_GPUS.iterdir())) if DRIVER_GPUS.is_dir() else 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or physical == 0:
        return physical
    seen: set[str] = set()
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry in seen:
            return 0
        number = int(entry) if entry.isdecimal() else None
        valid = entry.startswith(("GPU-", "MIG-")) if number is None else number < physical
        if not valid:
            break
        seen.add(entry)
    return len(seen)
