"""What a child inherits, and where it computes."""

import os
from pathlib import Path

import pytest

from ditty.config.choices import Device
from ditty.config.launchspec import LaunchSpec
from ditty.errors import SpecError
from ditty.processes import environment
from ditty.processes.environment import child_environment, resolve_device

CPU = LaunchSpec(device=Device.CPU)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that gives this machine so many GPUs, and CUDA_VISIBLE_DEVICES a value."""
    monkeypatch.setattr(environment, "DEVICE_FILES", tmp_path / "dev")
    monkeypatch.setattr(environment, "DRIVER_GPUS", tmp_path / "gpus")

    def give(count: int, visible: str | None = None) -> None:
        (tmp_path / "dev").mkdir()
        for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(count))]:
            (tmp_path / "dev" / name).touch()
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return give


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "PREFECT_API_KEY", "PREFECT_API_URL", "WANDB_API_KEY"]
    + ["ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_CONFIG_FILE"]
    + ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "FSDP_VERSION"]
    + ["SLURM_NTASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MKL_NUM_THREADS", "GITHUB_TOKEN"],
)
def test_stays_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary")
    child = child_environment(CPU)
    assert name not in child
    assert "canary" not in child.values()


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"]
    + ["NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF", "OMP_PROC_BIND"]
    + ["HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "DITTY_HOME", "https_proxy"]
    + ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PYTHONHASHSEED"],
)
def test_is_inherited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value")
    assert child_environment(CPU)[name] == "value"


def test_the_spec_names_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    child = child_environment(LaunchSpec(device=Device.CPU, environment=["WANDB_API_KEY"]))
    assert child["WANDB_API_KEY"] == "canary"


def test_a_named_variable_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SpecError, match=r"names WANDB_API_KEY, which is not set"):
        child_environment(LaunchSpec(device=Device.CPU, environment=["WANDB_API_KEY"]))


def test_a_named_variable_must_not_contradict_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(SpecError, match=r"OMP_NUM_THREADS.*launch\.threads"):
        child_environment(LaunchSpec(device=Device.CPU, environment=["OMP_NUM_THREADS"]))


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "expected"),
    [(None, 1, 8, "8"), (None, 3, 8, "2"), (None, 9, 8, "1"), (5, 2, 8, "5")],
)
def test_threads(
    threads: int | None, processes: int, cores: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    launch = LaunchSpec(device=Device.CPU, threads=threads, num_processes=processes)
    assert child_environment(launch)["OMP_NUM_THREADS"] == expected


def test_the_child_finds_the_same_ditty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    root = str(Path(environment.__file__).parents[2])
    assert child_environment(CPU)["PYTHONPATH"].split(os.pathsep) == [root, "/elsewhere"]


def test_torchrun_leaves_the_grace_to_the_guard() -> None:
    launch = LaunchSpec(device=Device.CPU, grace_seconds=120.5)
    assert int(child_environment(launch)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 120.5


def test_several_machines_keep_their_ranks_off_the_launchers_store() -> None:
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    several = LaunchSpec(device=Device.CPU, num_machines=2, machine_rank=1, main_host="node0")
    assert child_environment(several)[name] == "1"
    assert name not in child_environment(CPU)


def test_a_launch_on_the_cpu_hides_the_gpus(gpus) -> None:
    gpus(2, visible="0,1")
    child = child_environment(CPU)
    assert (child["ACCELERATE_USE_CPU"], child["CUDA_VISIBLE_DEVICES"]) == ("true", "")


def test_a_launch_on_gpus_keeps_their_selection(gpus) -> None:
    gpus(4, visible="1,3")
    child = child_environment(LaunchSpec(num_processes=2))
    assert child["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "ACCELERATE_USE_CPU" not in child


@pytest.mark.parametrize(
    ("count", "visible", "seen"),
    [
        (0, None, 0),
        (2, None, 2),
        (2, "", 0),
        (2, "-1", 0),
        (2, "1", 1),
        (2, "0, 1", 2),
        (2, "0,5,1", 1),  # the rest after an invalid entry is invisible
        (2, "1,1", 0),  # a repeated one makes all invisible
        (2, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        (2, "MIG-a,MIG-b", 2),
        (0, "0", 0),
    ],
)
def test_visible_gpus(count: int, visible: str | None, seen: int, gpus) -> None:
    gpus(count, visible)
    assert resolve_device(LaunchSpec()) == ("cuda" if seen else "cpu")
    asked = {"device": Device.CUDA, "num_processes": seen + 1}
    with pytest.raises(SpecError, match="num_processes" if seen else "no NVIDIA GPU is visible"):
        resolve_device(LaunchSpec.model_validate(asked))
    if seen:
        assert resolve_device(LaunchSpec(device=Device.CUDA, num_processes=seen)) == "cuda"
    assert resolve_device(LaunchSpec(device=Device.CPU, num_processes=9)) == "cpu"


def test_gpus_of_a_driver_without_device_files(gpus, tmp_path: Path) -> None:
    gpus(0)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert resolve_device(LaunchSpec()) == "cuda"
