"""The spec: one YAML file that describes a run, and the form of the flow in Prefect's UI.

Every key has a default except `data.source` (or `data.sources`) and `model.base_model`. Pairs that
make no sense are refused here, before a process is started.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ditty.config import gates, legal
from ditty.config.choices import (
    ActivationCheckpointing,
    Adapter,
    Attention,
    Device,
    FinalWeights,
    OnAnomaly,
    Optimizer,
    Precision,
    Quantization,
    Sampling,
    Schedule,
    Sharding,
    Tracker,
    Where,
)
from ditty.config.dataspec import DataSpec, Section
from ditty.config.slurmspec import SlurmSpec
from ditty.errors import scrub

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class ModelSpec(Section):
    """The base model and what is trained of it."""

    base_model: str
    """A hub model, a folder with safetensors (or .bin files, converted once), or a .gguf file
    (dequantized once)."""
    revision: str | None = None
    """Commit, branch or tag of a hub model; resolved to a commit."""
    adapter: Adapter = Adapter.LORA
    """`lora` trains low-rank matrices, `dora` also the length of each layer's weight rows
    (arXiv:2402.09353), `none` all weights."""
    quantization: Quantization = Quantization.NONE
    """`nf4` stores the frozen base in 4 bits, double-quantized (QLoRA), `int8` in 8 bits, `fp8` in
    e4m3, with products in float8 too (GPUs from Ada and Hopper on, and CPUs)."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    lora_alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    rank_stabilized: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732)."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout before the adapter."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (all but the head), the names of layers that get an adapter, or a regular
    expression for their whole names."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Names of layers that are trained whole beside the adapter, e.g. lm_head, embed_tokens."""
    attention: Attention = Attention.PACKED
    """How attention is kept inside each packed document."""
    trust_remote_code: bool = False
    """Run code from the model's repository; only with a revision that is a commit."""

    @model_validator(mode="after")
    def _legal(self) -> "ModelSpec":
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
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Rows in one forward pass of one process. `auto`: on GPUs as many as fit with all activations
    kept, and as many fewer `gradient_accumulation_steps`: their product stays what it is with 1."""
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    """Forward passes a process adds up before a step."""
    sharding: Sharding = Sharding.AUTO
    """How the processes share the memory of weights, gradients and optimizer."""
    shard_size: int | None = Field(default=None, ge=1)
    """`hybrid`: processes that share one copy; by default those of a machine."""
    cpu_offload: bool = False
    """`fsdp2`, `hybrid`, `zero3`: keep weights and optimizer in host memory between uses. `int8`:
    blocks that do not fit the GPU stay on the host, unquantized, and are streamed."""
    offload_gpu_gb: float | None = Field(default=None, gt=0)
    """`int8` with `cpu_offload`: GPU memory for the weights, in GB; by default 60% of what is
    free."""
    optimizer: Optimizer = Optimizer.ADAMW
    """What turns gradients into new weights."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule.COSINE
    """The learning rate by step; `cosine` and `linear` end at 0."""
    schedule_options: dict[str, float | str] = Field(default_factory=dict)
    """Arguments of transformers' schedule, e.g. {num_cycles: 3} or {min_lr_rate: 0.1}."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; norms and biases are left alone."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger L2 norm are scaled down to it."""
    on_non_finite: Literal[OnAnomaly.SKIP, OnAnomaly.STOP] = OnAnomaly.STOP
    """A step whose loss or gradients are not finite: `stop` the run or `skip` the step. It is told
    with its rows, and nothing of it is ever kept. With a `skip`, here or below, each step waits for
    its numbers, which on GPUs costs some speed."""
    on_spike: OnAnomaly = OnAnomaly.WARN
    """A step whose loss or gradient norm is far above those of the steps before: `warn` in the log
    and the metrics, with its rows, `skip` it, or `stop` before anything of it is kept."""
    spike_threshold: float = Field(default=6.0, gt=0)
    """From how many robust standard deviations (1.4826 x MAD) above the median it is a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps before it that it is compared with; while there are less than half, nothing is a
    spike."""
    precision: Precision = Precision.BF16
    """`bf16` on GPUs, `fp16` on those before Ampere (with a loss scale that adapts); `fp32` for
    exact comparisons and on CPUs without bf16 units."""
    deterministic: bool = True
    """Kernels that add in a fixed order, so that a resume on GPUs is bitwise. Off is a little
    faster, and saves memory in fp32 or with `model.attention: sdpa`."""
    compile: bool | None = None
    """Compile the model's blocks (torch.compile). By default on GPUs, in bf16 and fp16, where the
    model and the sharding allow it; the log says where not."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.AUTO
    """Which blocks recompute their activations in the backward pass (a third more work for each):
    by default, on GPUs, only as many as do not fit the memory otherwise. The result is the same,
    but for the rounding of compiled blocks on GPUs. Under `zero3` `auto` is `none`."""
    max_memory_gb: float | None = Field(default=None, gt=0)
    """GPU memory, in GB (1e9 bytes), that `activation_checkpointing: auto` may plan with; by
    default 92% of the card's."""
    sampling: Sampling = Sampling.RANDOM
    """The order of rows within an epoch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order of rows, the adapter's start and dropout."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Checkpoints kept besides the best by held-out loss; older ones go after a newer one is
    committed."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations; always one before the first and after the last step."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a better held-out loss."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Early stopping counts a held-out loss as better from this much lower, in nats a token."""
    final_weights: FinalWeights = FinalWeights.LAST
    """Which weights are the result; `best`, those of the lowest held-out loss, needs `eval_steps`
    and saves at each better one."""
    num_samples: int = Field(default=0, ge=0)
    """Held-out prompts that the model completes (greedily) before and after training."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Steps between such completions, besides those before and after."""
    sample_max_tokens: int = Field(default=64, ge=1)
    """Tokens of each such completion, at most."""
    report_to: list[Tracker] = Field(default_factory=list)
    """Trackers that are told each step's numbers, the spec, the lineage and the picture. Names of
    the variables that they need (WANDB_API_KEY, MLFLOW_TRACKING_URI ...): launch.environment."""

    @property
    def micro_batch(self) -> int:
        """`micro_batch_size` as a number: `auto` is 1 until it is resolved (ditty.planning.fit)."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def skips(self) -> bool:
        """Whether a step may be left out once its numbers are seen."""
        return OnAnomaly.SKIP in (self.on_non_finite, self.on_spike)

    @property
    def evaluation_decides(self) -> bool:
        """Whether the held-out loss has a say in the trained weights."""
        return self.early_stopping_patience is not None or self.final_weights is FinalWeights.BEST

    @model_validator(mode="before")
    @classmethod
    def _checkpointing_was_a_switch(cls, values: Any) -> Any:
        """Finished runs and deployments keep specs of before."""
        if isinstance(values, dict) and isinstance(values.get("gradient_checkpointing"), bool):
            rest = {k: v for k, v in values.items() if k != "gradient_checkpointing"}
            recomputes = {"activation_checkpointing": ActivationCheckpointing.ALL}
            return recomputes | rest if values["gradient_checkpointing"] else rest
        return values

    @field_validator("schedule_options")
    @classmethod
    def _options_of_the_schedule(
        cls, options: dict[str, float | str], info: ValidationInfo
    ) -> dict[str, float | str]:
        if "schedule" in info.data:  # else it is wrong itself
            legal.check_schedule_options(info.data["schedule"], options)
        return options

    @model_validator(mode="after")
    def _evaluates(self) -> "TrainSpec":
        for key in ("early_stopping_patience", "final_weights"):
            if getattr(self, key) not in (None, FinalWeights.LAST) and self.eval_steps is None:
                raise ValueError(f"{key} needs evaluations: set eval_steps")
        return self


class LaunchSpec(Section):
    """Processes and how to deal with their end. Nothing here changes the result of a stage."""

    backend: Where = Where.LOCAL
    """Where the processes of training and of the other stages with tensors run: here, or as jobs of
    a Slurm cluster, which has the same DITTY_HOME and Python."""
    slurm: SlurmSpec = Field(default_factory=SlurmSpec)
    """What `backend: slurm` asks the cluster for."""
    num_processes: int = Field(default=1, ge=1)
    """Training processes on each machine; on GPUs one a GPU."""
    num_machines: int = Field(default=1, ge=1)
    """Machines that train together; with `backend: local` each starts the same spec."""
    machine_rank: int | None = Field(default=None, ge=0)
    """Which of them this is, from 0; by default DITTY_MACHINE_RANK or SLURM_NODEID says so."""
    main_host: str | None = None
    """Machine 0's name or address as the others reach it; by default DITTY_MAIN_HOST says so."""
    main_port: int | None = Field(default=None, ge=1, le=65535)
    """A free port of machine 0; by default DITTY_MAIN_PORT, or 29500."""
    collective_timeout_seconds: float = Field(default=600.0, gt=0)
    """A process that waits for another one longer than this gives it up for lost. Raise it where
    a single save, or loading the model, takes longer."""
    device: Device = Device.AUTO
    """Where to train."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads a process; by default the cores divided by the processes."""
    grace_seconds: float = Field(default=20.0, ge=0)
    """Time to save between SIGTERM and SIGKILL; Prefect's runner itself waits 30 s."""
    retries: int = Field(default=3, ge=0)
    """Attempts after the first, where the failure can pass (preempted, crashed, unreachable). Each
    new checkpoint of a training restores them: they count those in a row that did not get on."""
    retry_delay_seconds: float = Field(default=10.0, ge=0)
    """Before the first retry; doubles with each. A training that got on is retried at once."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that the training process gets besides the usual ones."""

    @model_validator(mode="after")
    def _one_of_the_machines(self) -> "LaunchSpec":
        if self.machine_rank is not None and self.machine_rank >= self.num_machines:
            raise ValueError(
                f"machine_rank is {self.machine_rank} of num_machines: {self.num_machines}; "
                f"expected 0 to {self.num_machines - 1}"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_backend(self) -> "LaunchSpec":
        if self.backend is Where.LOCAL:
            return self
        if self.device is Device.AUTO:
            raise ValueError(
                f"device: auto looks for a GPU here, and backend: {self.backend} runs elsewhere; "
                "write device: cuda, or cpu"
            )
        for key in ("machine_rank", "main_host"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} goes with backend: local; which machines {self.backend} gives is known "
                    "when the job starts: remove it"
                )
        return self

    @property
    def world_size(self) -> int:
        """Training processes on all machines."""
        return self.num_processes * self.num_machines


class UploadSpec(Section):
    """Where checkpoints and the result are copied. Credentials come from the environment."""

    url: str | None = None
    """`s3://bucket/prefix` or `file:///folder`; none: nothing is uploaded."""
    checkpoints: bool = True
    """Upload checkpoints while training, so that another machine can resume."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"s3://[^/@\s]+(/\S*)?|file:///[^/].*", url):
            raise ValueError(
                f"{scrub(url)!r} is no target; expected s3://bucket/prefix or file:///folder"
            )
        return url.rstrip("/") if url else url


class PromoteSpec(Section):
    """When the flow `refresh` puts a new result in the place of the one before."""

    margin: float = Field(default=0.0, ge=0)
    """Nats a supervised token by which the new held-out loss must be the lower one; 0: any."""


class EvaluateSpec(Section):
    """What is measured after the training, of its result and of the base model."""

    num_samples: int = Field(default=0, ge=0)
    """Held-out prompts that both complete (greedily), each `train.sample_max_tokens` at most."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness (the package lm_eval): names that it knows, or YAML files of
    its format. Each is measured once, whatever stands beside it."""
    tasks_limit: int | None = Field(default=None, ge=1)
    """Questions of each task, at most; all by default."""
    tasks_batch_size: int = Field(default=8, ge=1)
    """Questions of a task that are answered at once."""
    require: dict[str, str] = Field(default_factory=dict)
    """What a result must measure, or it is not uploaded: `eval_loss`, `eval_perplexity` or
    `task/metric`, and a condition: {eval_loss: "<= base"}, {eval_loss: "< base - 0.1"},
    {hellaswag/acc_norm: ">= 0.4"}."""

    @field_validator("require")
    @classmethod
    def _conditions(cls, require: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for measure, text in require.items():
            gates.Gate.parse(measure, text)
            gates.check_measure(measure, has_tasks=bool(info.data.get("tasks", True)))
        return require


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
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    """What is measured after the training, of its result and of the base model."""
    promote: PromoteSpec = Field(default_factory=PromoteSpec)
    """When the flow `refresh` puts a new result in the place of the one before."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no run name; expected lower-case letters, digits, '.', '_' and '-', "
                "starting with a letter or digit, at most 63"
            )
        return name

    @model_validator(mode="after")
    def _holds_out(self) -> "RunSpec":
        if self.train.evaluation_decides and self.data.eval_fraction == 0:
            raise ValueError(
                "train.early_stopping_patience and train.final_weights: best go by held-out rows, "
                "and data.eval_fraction is 0; raise it (0.05 is the default), or remove those keys"
            )
        return self

    @model_validator(mode="after")
    def _measures(self) -> "RunSpec":
        wanted = set(gates.HELD_OUT) & set(self.evaluate.require) or self.evaluate.num_samples
        if wanted and self.data.eval_fraction == 0:
            raise ValueError(
                "evaluate.require (eval_loss, eval_perplexity) and evaluate.num_samples go by "
                "held-out rows, and data.eval_fraction is 0; raise it (0.05 is the default), or "
                "remove these"
            )
        return self

    @model_validator(mode="after")
    def _legal(self) -> "RunSpec":
        legal.check(legal.Strategy.of(self))
        return self

    @property
    def sharding(self) -> Sharding:
        """`train.sharding` with `auto` resolved."""
        return legal.Strategy.of(self).sharding

    @property
    def global_batch_size(self) -> int:
        """Rows a step over all processes."""
        train = self.train
        return train.micro_batch * train.gradient_accumulation_steps * self.launch.world_size
