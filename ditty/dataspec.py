"""The data part of the spec, and what every part of it has in common."""

import re
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ditty.choices import DataFormat, LossOn, OperationMethod, Overlong, StoppingStrategy


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


class SourceSpec(Section):
    """One of several sources; its keys are those of `data` itself."""

    source: str
    """As `data.source`."""
    subset: str | None = None
    """The configuration's name of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; resolved to a commit."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first rows of this source."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the mixed rows, relative to the others' weights; all have one, or none has."""


class DataSpec(Section):
    """Rows in, packed token rows out."""

    source: str | None = None
    """A hub data set; a .jsonl/.json/.csv/.txt file (also .gz, .zst, .bz2) or a .parquet file, a
    folder of such files or a pattern (`data/*.jsonl`), or a URL of them (s3://, https:// ...); a
    folder saved by datasets; or `module:function`, which yields rows as dicts."""
    subset: str | None = None
    """The configuration's name of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; resolved to a commit."""
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
    packing: bool = True
    """Put several short rows into one, attention kept inside each."""
    eval_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of rows held out, chosen by a hash of the row."""
    eval_max_rows: int | None = Field(default=None, ge=1)
    """Hold out at most this many rows; the rest of the held-out rows is not used at all."""
    num_proc: int = Field(default=1, ge=1)
    """Processes for the row operations; does not change the result."""

    @model_validator(mode="after")
    def _one_way_in(self) -> "DataSpec":
        if (self.source is None) == (not self.sources):
            got = "neither" if self.source is None else "both"
            raise ValueError(f"expected source, or sources for several; got {got}")
        if self.sources and (self.subset, self.split, self.revision) != (None, "train", None):
            raise ValueError("subset, split and revision go into each of sources, not beside them")
        weighted = [part.source for part in self.sources if part.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(
                f"of {len(self.sources)} sources {len(weighted)} have a weight ({weighted[0]}); "
                "expected all, or none to take every row of each"
            )
        return self

    @property
    def parts(self) -> list[SourceSpec]:
        """The sources, one or several, each with its own limit of rows."""
        if self.source is None:
            return self.sources
        keys = ("source", "subset", "split", "revision", "max_rows")
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
