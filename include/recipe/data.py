"""Recipe fields: the dataset, the data checks, deduplication, the holdout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, WrapValidator

if TYPE_CHECKING:
    from include.data.sources import DatasetRef

Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _name_or_names(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except ValidationError:  # which has one error for each of the two types
        raise ValueError("must be a name, or a list of names") from None


class Data(BaseModel):
    """The dataset, and how its rows are checked, deduplicated and split."""

    dataset: Annotated[Name | Annotated[list[Name], Field(min_length=1)], WrapValidator(_name_or_names)] = Field(
        "mlabonne/FineTome-100k",
        description="A dataset on the Hugging Face Hub (`owner/name`), or the path or URL of a parquet, jsonl(.gz), "
        "json(.gz) or csv(.gz) file, of a folder of such files (`data/`), or a pattern (`data/*.jsonl`); or a list of "
        "paths and URLs. Several files are one dataset: they are read in the order of their names, those of a list in "
        'its order. In the trigger form, a list is JSON: `["a.jsonl", "b.jsonl"]`.',
    )
    dataset_format: Literal["sharegpt", "alpaca"] = Field(
        "sharegpt",
        description="Format of the rows. `sharegpt`: a list of turns. `alpaca`: the columns instruction, input and "
        "output (or response), which become a conversation of one exchange. Rows of another format are refused.",
    )
    dataset_config: str | None = Field(
        None, description="Configuration of the Hub dataset. Empty (default): the dataset has only one."
    )
    dataset_split: str = Field(
        "train",
        min_length=1,
        description="Split of the Hub dataset. In a JSON file with several lists of rows: the list of that name.",
    )
    dataset_revision: str | None = Field(
        None,
        description="Branch, tag or commit of the Hub dataset. Empty (default): the newest commit. Each run pins the "
        "commit that it finds.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Number of rows to use, from the start of the dataset. Empty (default): all rows."
    )
    merge_turns: bool = Field(
        False, description="Join consecutive turns of the same role. Off (default): such a row is refused."
    )
    max_refused_share: Share = Field(
        0.05,
        description="The run fails if validation refuses more than this share of the rows. Exact copies do not count.",
    )
    check_limits: dict[str, Share] = Field(
        {},
        description="Share of rows that may fail a data check before the run fails, by name of the check; for example "
        "`special_token_text: 0`. The report lists the names. A check without an entry keeps its default limit.",
    )
    near_duplicates: Literal["report", "drop"] = Field(
        "report",
        description="How near-duplicates of an earlier row are handled. `report`: they are counted and used. `drop`: "
        "they are not used. A near-duplicate of a held-out row is never used for training.",
    )
    near_duplicate_similarity: float = Field(
        0.85,
        ge=0.5,
        le=1,
        description="Two rows are near-duplicates if they share at least this part of their three-word sequences "
        "(Jaccard similarity, estimated by MinHash).",
    )
    decontaminate_against: str | None = Field(
        None,
        description="Path or URL of a file with benchmark prompts: one prompt per line (txt), or a text column or "
        "conversations (jsonl, json, csv, parquet). Rows that contain a prompt, or eight consecutive words of one, are "
        "not used. Empty (default): no decontamination.",
    )
    holdout_share: Share = Field(
        0.05,
        lt=1,
        description="Share of the rows that are held out from training to evaluate the adapter. A hash of its content "
        "decides whether a row is held out.",
    )
    max_holdout_rows: int = Field(500, ge=1, description="Maximum number of held-out rows to evaluate on.")


def dataset_ref(recipe: Data) -> DatasetRef:
    """Return the reference to a recipe's dataset that `include.data.sources` takes."""
    from include.data.sources import DatasetRef  # file systems and Hub clients; the engine does not need them

    return DatasetRef(recipe.dataset, recipe.dataset_config, recipe.dataset_split, recipe.dataset_revision)
