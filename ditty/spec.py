"""The spec: one YAML file that describes a run, and the form of the flow in Prefect's UI.

Every key has a default except `data.source` and `model.base_model`. Pairs that make no sense are
refused here, before a process is started.
"""

import re
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class OperationMethod(StrEnum):
    """A row operation: the `datasets.Dataset` method of the same name."""

    FILTER = "filter"
    MAP = "map"


class DataFormat(StrEnum):
    """The shape of a row after the operations."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"


class LossOn(StrEnum):
    """Which tokens are supervised."""

    ASSISTANT = "assistant"
    COMPLETION = "completion"
    ALL = "all"


class Overlong(StrEnum):
    """What happens to a row of more than `seq_len` tokens."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class Adapter(StrEnum):
    """What is trained: everything, or low-rank matrices beside a frozen base."""

    NONE = "none"
    LORA = "lora"


class Quantization(StrEnum):
    """How the frozen base is stored."""

    NONE = "none"
    NF4 = "nf4"


class Attention(StrEnum):
    """`packed`: within documents only. `sdpa`, `eager`: transformers' own, block-diagonal mask."""

    PACKED = "packed"
    SDPA = "sdpa"
    EAGER = "eager"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; trained weights are kept in fp32 either way."""

    FP32 = "fp32"
    BF16 = "bf16"


class Schedule(StrEnum):
    """The learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Sampling(StrEnum):
    """The order of rows within an epoch."""

    RANDOM = "random"
    LENGTH_GROUPED = "length_grouped"
    SEQUENTIAL = "sequential"


class Device(StrEnum):
    """Where to train. `auto`: a GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Section(BaseModel):
    """A part of the spec: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Operation(Section):
    """One row operation; a cached stage of its own."""

    method: OperationMethod
    """`filter` keeps rows for which the function is true, `map` replaces or extends them."""
    function: str
    """`module:name`, or `file.py:name` relative to the spec."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed to the function after the row."""
    batched: bool = False
    """Pass a dict of columns of up to 1,000 rows instead of one row."""
    remove_columns: list[str] = Field(default_factory=list)
    """Columns that `map` drops."""


class DataSpec(Section):
    """Rows in, packed token rows out."""

    source: str
    """A hub data set, a .jsonl/.json/.csv/.parquet/.txt file, a folder saved by datasets, or
    `module:function`, which yields rows as dicts."""
    subset: str | None = None
    """The configuration's name of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; resolved to a commit."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first rows of the source."""
    operations: list[Operation] = Field(default_factory=list)
    """Row operations, in order."""
    format: DataFormat = DataFormat.MESSAGES
    """`messages`: a list of {role, content}. `prompt_completion`: two strings. `text`: one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Standard column name (messages, prompt, completion, text) -> the name in your data."""
    loss_on: LossOn | None = None
    """Supervised tokens; by default those of the assistant, the completion, or all of a text."""
    seq_len: int = Field(default=1024, ge=8)
    """Tokens in a row, at most."""
    overlong: Overlong = Overlong.TRUNCATE
    """What happens to a row of more than `seq_len` tokens."""
    packing: bool = True
    """Put several short rows into one, attention kept inside each."""
    eval_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of rows held out, chosen by a hash of the row."""
    eval_max_rows: int | None = Field(default=None, ge=1)
    """Hold out at most this many rows; the rest of the held-out rows is not used at all."""
    num_proc: int = Field(default=1, ge=1)
    """Processes for the row operations; does not change the result."""

    @model_validator(mode="after")
    def _loss_fits_format(self) -> "DataSpec":
        legal = {
            DataFormat.MESSAGES: (LossOn.ASSISTANT, LossOn.ALL),
            DataFormat.PROMPT_COMPLETION: (LossOn.COMPLETION, LossOn.ALL),
            DataFormat.TEXT: (LossOn.ALL,),
        }[self.format]
        if self.loss_on is not None and self.loss_on not in legal:
            raise ValueError(
                f"loss_on: {self.loss_on} does not go with format: {self.format}; "
                f"expected {' or '.join(legal)}"
            )
        unknown = set(self.columns) - {"messages", "prompt", "completion", "text"}
        if unknown:
            raise ValueError(
                f"columns maps {sorted(unknown)}; expected messages, prompt, completion or text"
            )
        return self

    @property
    def supervised(self) -> LossOn:
        """`loss_on` with its default resolved."""
        natural = {
            DataFormat.MESSAGES: LossOn.ASSISTANT,
            DataFormat.PROMPT_COMPLETION: LossOn.COMPLETION,
            DataFormat.TEXT: LossOn.ALL,
        }
        return self.loss_on or natural[self.format]


class ModelSpec(Section):
    """The base model and what is trained of it."""

    base_model: str
    """A hub model, a folder with safetensors, or a .gguf file (dequantized once)."""
    revision: str | None = None
    """Commit, branch or tag of a hub model; resolved to a commit."""
    adapter: Adapter = Adapter.LORA
    """`lora` trains low-rank matrices, `none` all weights."""
    quantization: Quantization = Quantization.NONE
    """`nf4` stores the frozen base in 4 bits, double-quantized (QLoRA)."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    lora_alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout before the adapter."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (all but the head), or the names of layers that get an adapter."""
    attention: Attention = Attention.PACKED
    """How attention is kept inside each packed document."""
    trust_remote_code: bool = False
    """Run code from the model's repository; only with a revision that is a commit."""

    @model_validator(mode="after")
    def _legal(self) -> "ModelSpec":
        if self.quantization is not Quantization.NONE and self.adapter is Adapter.NONE:
            raise ValueError(
                f"quantization: {self.quantization} freezes the base, and adapter: none trains it; "
                "use adapter: lora (QLoRA), or quantization: none"
            )
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "")
        if self.trust_remote_code and not pinned:
            raise ValueError(
                "trust_remote_code runs a stranger's code: pin model.revision to the commit "
                "(40 hex digits) that you have read"
            )
        return self


class TrainSpec(Section):
    """The optimization. A step is an optimizer step, nothing else."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps; overrides `epochs`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the packed rows."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows in one forward pass of one process."""
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    """Forward passes a process adds up before a step."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule.COSINE
    """The learning rate after warm-up; `cosine` and `linear` end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay; norms and biases are left alone."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger L2 norm are scaled down to it."""
    precision: Precision = Precision.BF16
    """`bf16` on GPUs; `fp32` for exact comparisons and on CPUs without bf16 units."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    sampling: Sampling = Sampling.RANDOM
    """The order of rows within an epoch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order of rows, the adapter's start and dropout."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Checkpoints kept; older ones go after a newer one is committed."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations; always one before the first and after the last step."""
    num_samples: int = Field(default=0, ge=0)
    """Held-out prompts that the model completes (greedily) before and after training."""
    sample_max_tokens: int = Field(default=64, ge=1)
    """Tokens of each such completion, at most."""


class LaunchSpec(Section):
    """Processes and how to deal with their end. Nothing here changes the result of a stage."""

    num_processes: int = Field(default=1, ge=1)
    """Training processes on this machine; more than one is data-parallel (DDP)."""
    device: Device = Device.AUTO
    """Where to train."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads a process; by default the cores divided by the processes."""
    grace_seconds: float = Field(default=20.0, ge=0)
    """Time to save between SIGTERM and SIGKILL; Prefect's runner itself waits 30 s."""
    retries: int = Field(default=3, ge=0)
    """Attempts after the first, where the failure can pass (preempted, crashed, unreachable)."""
    retry_delay_seconds: float = Field(default=10.0, ge=0)
    """Before the first retry; doubles with each."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that the training process gets besides the usual ones."""


class UploadSpec(Section):
    """Where checkpoints and the result are copied. Credentials come from the environment."""

    url: str | None = None
    """`s3://bucket/prefix` or `file:///folder`; none: nothing is uploaded."""
    checkpoints: bool = True
    """Upload checkpoints while training, so that another machine can resume."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"s3://[^/@\s]+(/\S*)?|file:///.*", url):
            raise ValueError(f"{url!r} is no target; expected s3://bucket/prefix or file:///folder")
        return url.rstrip("/") if url else url


class RunSpec(Section):
    """A run: its name, its data, its model, and how it is trained, launched and uploaded."""

    name: str
    """Names the run directory; the same name resumes. [a-z0-9][a-z0-9._-]{0,62}"""
    data: DataSpec
    """Rows in, packed token rows out."""
    model: ModelSpec
    """The base model and what is trained of it."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """The optimization."""
    launch: LaunchSpec = Field(default_factory=LaunchSpec)
    """Processes and how to deal with their end."""
    upload: UploadSpec = Field(default_factory=UploadSpec)
    """Where checkpoints and the result are copied."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no run name; expected lower-case letters, digits, '.', '_' and '-', "
                "starting with a letter or digit, at most 63"
            )
        return name

    @property
    def global_batch_size(self) -> int:
        """Rows a step over all processes."""
        train = self.train
        return (
            train.micro_batch_size * train.gradient_accumulation_steps * self.launch.num_processes
        )
