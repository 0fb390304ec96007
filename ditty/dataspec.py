"""The data part of the spec, and what every part of it has in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ditty.choices import DataFormat, LossOn, OperationMethod, Overlong


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
