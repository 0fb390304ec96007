"""The data part of the spec, and what every part of it has in common."""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ditty.config.choices import (
    DataFormat,
    Engine,
    LossOn,
    OperationMethod,
    Overlong,
    Packing,
    StoppingStrategy,
)
from ditty.errors import cut


class Shape(NamedTuple):
    """What a format reads of a row, and which tokens may be supervised, its default first."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    loss_on: tuple[LossOn, ...]


SHAPES = {
    DataFormat.MESSAGES: Shape(("messages",), ("tools",), (LossOn.ASSISTANT, LossOn.ALL)),
    DataFormat.CONVERSATIONS: Shape(("conversations",), ("tools",), (LossOn.ASSISTANT, LossOn.ALL)),
    DataFormat.PROMPT_COMPLETION: Shape(
        ("prompt", "completion"), (), (LossOn.COMPLETION, LossOn.ALL)
    ),
    DataFormat.INSTRUCTION: Shape(
        ("instruction", "output"), ("input",), (LossOn.COMPLETION, LossOn.ALL)
    ),
    DataFormat.TEXT: Shape(("text",), (), (LossOn.ALL,)),
    DataFormat.TOKENS: Shape(
        ("input_ids",), ("labels", "attention_mask"), (LossOn.LABELS, LossOn.ALL)
    ),
}
COLUMNS = {n: None for shape in SHAPES.values() for n in (*shape.required, *shape.optional)}.keys()
"""The standard names of all columns that some format reads."""


def _keep_order(schema: dict[str, Any]) -> None:
    """Say where each key stands: PostgreSQL keeps a schema's keys sorted by their length."""
    for position, key in enumerate(schema.get("properties", {}).values()):
        key["position"] = position


class Section(BaseModel):
    """A part of the spec: immutable, and a key it does not know is an error."""

    # Prefect's form shows titles: the keys themselves, as the spec file and errors have them.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # somebody may have put a password there
        use_attribute_docstrings=True,
        field_title_generator=lambda name, _: name,
        json_schema_extra=_keep_order,
    )


# What a method without a function must be given and may be given, by `datasets`' own names.
_ARGUMENTS: dict[OperationMethod, tuple[set[str], set[str]]] = {
    OperationMethod.CAST_COLUMN: ({"column", "feature"}, set()),
    OperationMethod.FLATTEN: (set(), {"max_depth"}),
    OperationMethod.REMOVE_COLUMNS: ({"column_names"}, set()),
    OperationMethod.RENAME_COLUMN: ({"original_column_name", "new_column_name"}, set()),
    OperationMethod.RENAME_COLUMNS: ({"column_mapping"}, set()),
    OperationMethod.SELECT_COLUMNS: ({"column_names"}, set()),
    OperationMethod.SHUFFLE: ({"seed"}, set()),
    OperationMethod.SKIP: ({"n"}, set()),
    OperationMethod.SORT: ({"column_names"}, {"reverse", "null_placement"}),
    OperationMethod.TAKE: ({"n"}, set()),
}


class Operation(Section):
    """One row operation; a cached stage of its own."""

    method: OperationMethod
    """`filter` keeps rows for which the function is true, `map` replaces or extends them, `select`
    keeps those whose numbers the function returns, given all rows. The others take no function,
    but `kwargs`: what the method of `datasets.Dataset` takes."""
    function: str | None = None
    """`module:name`, or `file.py:name` relative to the spec."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments, passed to the function after the row, or to the method."""
    batched: bool = False
    """Pass a dict of columns of up to 1,000 rows instead of one row (`filter`, `map`)."""
    remove_columns: list[str] = Field(default_factory=list)
    """Columns that `map` drops."""

    @model_validator(mode="after")
    def _arguments_fit_method(self) -> "Operation":
        arguments = _ARGUMENTS.get(self.method)
        if arguments is None and self.function is None:
            raise ValueError(f"method: {self.method} needs function: module:name or file.py:name")
        if arguments is not None and self.function is not None:
            raise ValueError(f"method: {self.method} takes no function, but kwargs")
        if self.batched and self.method not in (OperationMethod.FILTER, OperationMethod.MAP):
            raise ValueError(f"batched goes with filter and map, not with method: {self.method}")
        if self.remove_columns and self.method is not OperationMethod.MAP:
            raise ValueError(f"remove_columns goes with map, not with method: {self.method}")
        if arguments is not None:
            self._check_kwargs(*arguments)
        return self

    def _check_kwargs(self, needed: set[str], optional: set[str]) -> None:
        known = sorted(needed | optional)
        for name in self.kwargs.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
            raise ValueError(f"method: {self.method} has no argument {name!r}: {hint}")
        if missing := sorted(needed - self.kwargs.keys()):
            raise ValueError(f"method: {self.method} needs kwargs: {', '.join(missing)}")
        seed = self.kwargs.get("seed")
        if self.method is OperationMethod.SHUFFLE and (type(seed) is not int or seed < 0):
            raise ValueError(
                f"method: {self.method}: kwargs.seed is {seed!r}, expected a whole number from 0"
            )

    @property
    def given(self) -> str:
        """What the function gets before `kwargs`, in words."""
        return "the rows" if self.batched or self.method is OperationMethod.SELECT else "the row"

    def describe(self) -> str:
        """What people read, e.g. `filter ops.py:is_clean` or `rename_column q, prompt`."""
        if self.function is None:
            text = f"{self.method} {', '.join(map(str, self.kwargs.values()))}".rstrip()
            return cut(text, 60)
        absolute = self.function.startswith("/")
        return f"{self.method} {Path(self.function).name if absolute else self.function}"


HELD_OUT = "ditty.dedup:decontaminate_held_out"
"""The function that is told which rows this data holds out."""

SQL = "sql:"
"""How a source that is a query begins."""

SPLIT = "train"

_OF_A_SOURCE = {
    "subset": None,
    "split": SPLIT,
    "revision": None,
    "connection": None,
    "version": None,
}
"""What says more of one source, with its default."""


class SourceSpec(Section):
    """One of several sources; its keys are those of `data` itself."""

    source: str
    """As `data.source`."""
    subset: str | None = None
    """The configuration's name of a hub data set."""
    split: str = SPLIT
    """The split of a hub data set, or of a folder saved by datasets."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; resolved to a commit."""
    connection: str | None = None
    """For a query: the environment variable that holds the database's URL (SQLAlchemy's)."""
    version: str | None = None
    """For a query: what its rows are known by, in the place of their content, for which every plan
    and run reads them all."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first rows of this source."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the mixed rows, relative to the others' weights; all have one, or none has."""

    @model_validator(mode="after")
    def _query_has_a_connection(self) -> "SourceSpec":
        _check_query(self)
        return self


def _check_query(part: "SourceSpec | DataSpec") -> None:
    """Raise a ValueError unless the keys of a query are there for a query, and for nothing else."""
    query = part.source is not None and part.source.startswith(SQL)
    if query and part.connection is None:
        raise ValueError(f"source: {SQL} needs connection: an environment variable's name")
    if part.connection is not None and not part.connection.isidentifier():
        raise ValueError("connection is no name of an environment variable: the URL goes into one")
    if not query and (part.connection, part.version) != (None, None):
        raise ValueError(f"connection and version go with source: {SQL}SELECT ..., remove them")


class DataSpec(Section):
    """Rows in, packed token rows out."""

    source: str | None = None
    """A hub data set; a .jsonl/.json/.csv/.txt file (also .gz, .zst, .bz2) or a .parquet file, a
    folder of such files or a pattern (`data/*.jsonl`); the URL of such a file, or of several by a
    pattern (s3://, https:// ...); a folder saved by datasets; `module:function`, which yields
    rows as dicts; or `sql:SELECT ... ORDER BY ...`."""
    subset: str | None = None
    """The configuration's name of a hub data set."""
    split: str = SPLIT
    """The split of a hub data set, or of a folder saved by datasets."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; resolved to a commit."""
    connection: str | None = None
    """For a query: the environment variable that holds the database's URL (SQLAlchemy's)."""
    version: str | None = None
    """For a query: what its rows are known by, in the place of their content, for which every plan
    and run reads them all."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first rows of the source, or of the mixture."""
    sources: list[SourceSpec] = Field(default_factory=list)
    """Several sources in the place of `source`. Without weights, all rows of one after the other;
    with them, each row is the next one of a source that is drawn by weight."""
    stopping_strategy: StoppingStrategy = StoppingStrategy.FIRST_EXHAUSTED
    """Of weighted sources: `first_exhausted` stops where one has no row left, `all_exhausted` goes
    on, from a source's first row again, until each row of all was there."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order in which weighted sources are drawn."""
    operations: list[Operation] = Field(default_factory=list)
    """Row operations, in order."""
    format: DataFormat = DataFormat.MESSAGES
    """`messages`: a list of {role, content}; `conversations`: of {from, value} (ShareGPT); both
    with `tools` where that column is there. `prompt_completion`: two strings. `instruction`:
    instruction, output and perhaps input, put into Alpaca's prompt. `text`: one string. `tokens`:
    input_ids, perhaps labels and attention_mask, taken as they are."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Standard column name (messages, prompt, completion, text ...) -> the name in your data."""
    loss_on: LossOn | None = None
    """Supervised tokens; by default those of the assistant, the completion, all of a text, or what
    `labels` says (all, without that column)."""
    chat_template: str | None = None
    """Jinja text that takes the place of the tokenizer's chat template, also in the result; in a
    spec file, or the name of a file beside it that holds the text."""
    seq_len: int = Field(default=1024, ge=8)
    """Tokens in a row, at most."""
    overlong: Overlong = Overlong.TRUNCATE
    """What happens to a row of more than `seq_len` tokens."""
    packing: Packing = Packing.BEST_FIT
    """Put several short rows into one, attention kept inside each."""
    eval_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of rows held out, chosen by a hash of the row."""
    eval_max_rows: int | None = Field(default=None, ge=1)
    """Hold out at most this many rows; the rest of the held-out rows is not used at all."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """A stage sets rows aside that cannot be used (broken JSON, another type, null where the format
    needs a value), and fails if they are more than this share of those it has read."""
    num_proc: int = Field(default=1, ge=1)
    """Processes for the row operations, and workers for the shards where `engine` is threads or
    processes; does not change the result."""
    shards: int = Field(default=1, ge=1)
    """Filter, map and tokenize the rows in so many parts, at most one for each 1,000 rows, each of
    which is kept when a worker is lost; does not change the result."""
    engine: Engine = Engine.THREADS
    """What makes the shards: `threads` or `processes` of this machine, or the workers of a cluster
    (`dask`, `ray`: the packages prefect-dask, prefect-ray), which must see DITTY_HOME, the base
    model and the files of your functions."""
    engine_address: str | None = None
    """Of the cluster's scheduler, tcp://host:8786 for example."""

    @field_validator("packing", mode="before")
    @classmethod
    def _packing_was_a_switch(cls, value: Any) -> Any:
        """Finished runs and deployments keep specs of before."""
        old = {True: Packing.BEST_FIT, False: Packing.NONE}
        return old[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way_in(self) -> "DataSpec":
        if (self.source is None) == (not self.sources):
            got = "neither" if self.source is None else "both"
            raise ValueError(f"expected source, or sources for several; got {got}")
        if self.source is not None:
            _check_query(self)
        if self.sources and any(getattr(self, k) != _OF_A_SOURCE[k] for k in _OF_A_SOURCE):
            names = ", ".join(_OF_A_SOURCE)
            raise ValueError(f"{names} go into each of sources, not beside them")
        weighted = [part.source for part in self.sources if part.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(
                f"of {len(self.sources)} sources {len(weighted)} have a weight ({weighted[0]}); "
                "expected all, or none to take every row of each"
            )
        return self

    @model_validator(mode="after")
    def _cluster_has_an_address(self) -> "DataSpec":
        example = {Engine.DASK: "tcp://host:8786", Engine.RAY: "ray://host:10001"}.get(self.engine)
        if example and self.engine_address is None:
            raise ValueError(f"engine: {self.engine} needs data.engine_address: {example}")
        if not example and self.engine_address is not None:
            raise ValueError(f"engine: {self.engine} takes no data.engine_address: remove it")
        return self

    @model_validator(mode="after")
    def _held_out_rows_are_known(self) -> "DataSpec":
        asked = [operation.function == HELD_OUT for operation in self.operations]
        if any(asked[:-1]):
            raise ValueError(
                f"{HELD_OUT} must be the last of operations: what the others make of a row decides "
                "whether it is held out"
            )
        if any(asked) and not self.eval_fraction:
            raise ValueError(
                f"{HELD_OUT} needs held-out rows, and eval_fraction is 0: raise it (0.05 is the "
                "default), or remove the operation"
            )
        return self

    @property
    def bound_operations(self) -> list[Operation]:
        """The operations, with what HELD_OUT is told."""
        shape = SHAPES[self.format]
        names = {n: self.columns.get(n, n) for n in (*shape.required, *shape.optional)}
        told = {"eval_fraction": self.eval_fraction, "columns": names}
        kwargs = {HELD_OUT: {"held_out": told}}
        return [
            operation.model_copy(
                update={"kwargs": {**operation.kwargs, **kwargs.get(operation.function or "", {})}}
            )
            for operation in self.operations
        ]

    @property
    def parts(self) -> list[SourceSpec]:
        """The sources, one or several, each with its own limit of rows."""
        if self.source is None:
            return self.sources
        keys = ("source", *_OF_A_SOURCE, "max_rows")
        return [SourceSpec.model_validate({key: getattr(self, key) for key in keys})]

    @model_validator(mode="after")
    def _loss_fits_format(self) -> "DataSpec":
        legal = SHAPES[self.format].loss_on
        if self.loss_on is not None and self.loss_on not in legal:
            raise ValueError(
                f"loss_on: {self.loss_on} does not go with format: {self.format}; "
                f"expected {' or '.join(legal)}"
            )
        unknown = sorted(set(self.columns) - COLUMNS)
        if unknown:
            raise ValueError(f"columns maps {unknown}; expected one of {', '.join(COLUMNS)}")
        return self

    @model_validator(mode="after")
    def _template_is_used(self) -> "DataSpec":
        if self.chat_template is None:
            return self
        if not re.search(r"\{[{%]", self.chat_template):
            raise ValueError(
                f"chat_template: {self.chat_template[:80]!r} is no Jinja text ({{{{ ... }}}}), and "
                "no file beside a spec file; give one of them"
            )
        chats = [f for f, shape in SHAPES.items() if LossOn.ASSISTANT in shape.loss_on]
        if self.format not in chats:
            raise ValueError(
                f"chat_template is for format: {' or '.join(chats)}, not for {self.format}; "
                "remove it"
            )
        return self

    @property
    def supervised(self) -> LossOn:
        """`loss_on` with its default resolved."""
        return self.loss_on or SHAPES[self.format].loss_on[0]
