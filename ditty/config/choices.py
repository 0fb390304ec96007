"""The choices of the spec: each enum is one question, each member an answer."""

from enum import StrEnum


class OperationMethod(StrEnum):
    """A row operation: the `datasets.Dataset` method of the same name."""

    FILTER = "filter"
    MAP = "map"
    SELECT = "select"
    CAST_COLUMN = "cast_column"
    FLATTEN = "flatten"
    REMOVE_COLUMNS = "remove_columns"
    RENAME_COLUMN = "rename_column"
    RENAME_COLUMNS = "rename_columns"
    SELECT_COLUMNS = "select_columns"
    SHUFFLE = "shuffle"
    SKIP = "skip"
    SORT = "sort"
    TAKE = "take"


class DataFormat(StrEnum):
    """The shape of a row after the operations."""

    MESSAGES = "messages"
    CONVERSATIONS = "conversations"
    PROMPT_COMPLETION = "prompt_completion"
    INSTRUCTION = "instruction"
    TEXT = "text"
    TOKENS = "tokens"


class StoppingStrategy(StrEnum):
    """When weighted sources are mixed enough: one of them, or each, has given all its rows."""

    FIRST_EXHAUSTED = "first_exhausted"
    ALL_EXHAUSTED = "all_exhausted"


class LossOn(StrEnum):
    """Which tokens are supervised."""

    ASSISTANT = "assistant"
    COMPLETION = "completion"
    LABELS = "labels"
    ALL = "all"


class Overlong(StrEnum):
    """What happens to a row of more than `seq_len` tokens."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class Engine(StrEnum):
    """What makes the shards: threads or processes here, or a cluster's workers."""

    THREADS = "threads"
    PROCESSES = "processes"
    DASK = "dask"
    RAY = "ray"


class Packing(StrEnum):
    """How short rows share one.

    `best_fit`: each where it leaves the least room, among those of a window of 4M tokens.
    `next_fit`: in the order of the rows, a new one where the next does not fit. `none`: one each.
    """

    BEST_FIT = "best_fit"
    NEXT_FIT = "next_fit"
    NONE = "none"


class Adapter(StrEnum):
    """What is trained: everything, or low-rank matrices beside a frozen base."""

    NONE = "none"
    LORA = "lora"
    DORA = "dora"


class Quantization(StrEnum):
    """How the frozen base is stored."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"
    FP8 = "fp8"


class ExportTo(StrEnum):
    """What is copied out of a run: what was trained, or a whole model without an adapter, as
    transformers or as llama.cpp has it."""

    ADAPTER = "adapter"
    MERGED = "merged"
    GGUF = "gguf"


class Attention(StrEnum):
    """`packed`: within documents only. `sdpa`, `eager`: transformers' own, block-diagonal mask."""

    PACKED = "packed"
    SDPA = "sdpa"
    EAGER = "eager"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; trained weights are kept in fp32 either way."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class ExportDtype(StrEnum):
    """Of the weights of a whole model that is exported; `q8_0` (8.5 bits a weight) and `q4_0` (4.5)
    are llama.cpp's, for a .gguf file: blocks of 32 with one scale."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    @property
    def precision(self) -> Precision | None:
        """It, where transformers has it too."""
        return Precision(self.value) if self.value in set(Precision) else None


class ActivationCheckpointing(StrEnum):
    """Which blocks compute their activations again in the backward pass: less memory, more work.

    `auto`: on GPUs as many as the memory asks for. `none`, `all`: no block, or each.
    """

    AUTO = "auto"
    NONE = "none"
    ALL = "all"


class Sharding(StrEnum):
    """How the processes of a training share its memory.

    `none`: one process. `ddp`: each process holds everything. `fsdp2`: weights, gradients and
    optimizer are cut over all processes (PyTorch's fully_shard). `hybrid`: cut over the processes
    of a machine, and repeated on each machine. `zero3`: DeepSpeed ZeRO stage 3. `auto`: `none` for
    one process; for several `ddp`, or `fsdp2` where a copy of everything does not fit a GPU.
    """

    AUTO = "auto"
    NONE = "none"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    HYBRID = "hybrid"
    ZERO3 = "zero3"


class Optimizer(StrEnum):
    """What turns gradients into new weights.

    `adamw`: torch's, fused on GPUs. `*_8bit`, `paged_*` and `lion`: bitsandbytes'; paged ones, on
    a GPU only, keep their state in memory that moves to the host when the GPU is full.
    `adafactor` and `muon` (matrices by Muon, vectors by AdamW): torch's.
    """

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW = "paged_adamw"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    LION = "lion"
    LION_8BIT = "lion_8bit"
    PAGED_LION = "paged_lion"
    PAGED_LION_8BIT = "paged_lion_8bit"
    ADAFACTOR = "adafactor"
    MUON = "muon"


class OnAnomaly(StrEnum):
    """What becomes of a step whose loss or gradients are out of the ordinary.

    `warn`: it is taken, and told. `skip`: it is not taken, the next one is. `stop`: the run ends
    before anything of it is kept.
    """

    WARN = "warn"
    SKIP = "skip"
    STOP = "stop"


class FinalWeights(StrEnum):
    """Which weights are the result: those after the last step, or those of the best evaluation."""

    LAST = "last"
    BEST = "best"


class Schedule(StrEnum):
    """The learning rate by step, as transformers' schedule of the same name.

    Those of transformers that are missing here look at the loss, and so would not be functions of
    the step alone. `constant` too warms up where `warmup_steps` says so.
    """

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


SCHEDULE_OPTIONS: dict[Schedule, dict[str, type]] = {
    Schedule.COSINE: {"num_cycles": float},
    Schedule.LINEAR: {},
    Schedule.CONSTANT: {},
    Schedule.CONSTANT_WITH_WARMUP: {},
    Schedule.COSINE_WITH_RESTARTS: {"num_cycles": int},
    Schedule.POLYNOMIAL: {"lr_end": float, "power": float},
    Schedule.INVERSE_SQRT: {"timescale": int},
    Schedule.COSINE_WITH_MIN_LR: {"num_cycles": float, "min_lr": float, "min_lr_rate": float},
    Schedule.COSINE_WARMUP_WITH_MIN_LR: {
        "num_cycles": float,
        "min_lr": float,
        "min_lr_rate": float,
        "warmup_lr_rate": float,
    },
    Schedule.WARMUP_STABLE_DECAY: {
        "num_decay_steps": int,
        "num_stable_steps": int,
        "warmup_type": str,
        "decay_type": str,
        "min_lr_ratio": float,
        "num_cycles": float,
    },
}
"""The arguments of each of transformers' schedules, besides the optimizer and the steps."""


class Sampling(StrEnum):
    """The order of rows within an epoch."""

    RANDOM = "random"
    LENGTH_GROUPED = "length_grouped"
    SEQUENTIAL = "sequential"


class Tracker(StrEnum):
    """Where a training's numbers are shown besides its own files, through accelerate.

    `tensorboard`: files in the run directory. The others: the packages of their names.
    """

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    TRACKIO = "trackio"


class Where(StrEnum):
    """Where a stage's processes run: here, or as a job of a Slurm cluster."""

    LOCAL = "local"
    SLURM = "slurm"


class Device(StrEnum):
    """Where to train. `auto`: a GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
