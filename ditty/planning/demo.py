"""The demo: an ordinary spec that ships with the package, on a model that is always to be had."""

import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml

from ditty.config.choices import Device, Precision
from ditty.config.launchspec import LaunchSpec
from ditty.config.spec import RunSpec
from ditty.config.specfile import apply_override, parse_spec
from ditty.pretrained.demo_model import smollm2
from ditty.processes.environment import resolve_device
from ditty.store.artifacts import Store


def demo_spec(store: Store, overrides: Sequence[str] = ()) -> RunSpec:
    """The demo's spec for this machine: base model where it can be had, precision by device.

    It uploads to a folder below the store's home, so that every stage runs.

    Raises:
        ModelError: neither the hub nor the package index has the base model for us.
    """
    values: dict[str, Any] = yaml.safe_load(
        resources.files("ditty.planning").joinpath("demo.yaml").read_text()
    )
    values["upload"] = {"url": f"file://{store.home}/uploads"}
    for override in overrides:
        apply_override(values, override)
    if values["model"]["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct":
        values["model"]["base_model"] = smollm2(store.home)
    launch = LaunchSpec(device=values.get("launch", {}).get("device", "auto"))
    on_gpu = resolve_device(launch) == Device.CUDA
    values["train"].setdefault("precision", (Precision.BF16 if on_gpu else Precision.FP32).value)
    return parse_spec(values, where="demo")


def use_it(adapter: str, base_model: str) -> str:
    """Three lines of transformers and peft that load the trained adapter."""
    base = os.fspath(base_model)
    return (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{adapter}")'
    )


def use_model(folder: str) -> str:
    """Three lines of transformers that load a whole model."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )


def use_gguf(folder: str) -> str:
    """How llama.cpp and transformers load a .gguf file."""
    return (
        f"llama-cli -m {folder}/model.gguf\n"
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="model.gguf")'
    )
