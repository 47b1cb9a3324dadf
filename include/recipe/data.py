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


Dataset = Annotated[Name | Annotated[list[Name], Field(min_length=1)], WrapValidator(_name_or_names)]


class Data(BaseModel):
    """The dataset, and how its rows are checked, deduplicated and split."""

    dataset: Dataset = Field(
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
    reasoning: Literal["keep", "drop", "refuse"] = Field(
        "keep",
        description="How the reasoning of answers is handled: `reasoning_content`, `thinking` or `<think>...</think>` "
        "before the answer. `keep`: it is trained with the answer, as the chat template writes it; a template that "
        "does not know reasoning gets it as `<think>...</think>`. `drop`: only the answer is used. `refuse`: the row "
        "is refused.",
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
        description="How near-duplicates are handled. `report`: they are counted and used. `drop`: of each group of "
        "near-duplicates only the first row is used. A group is never split between training and holdout.",
    )
    near_duplicate_similarity: float = Field(
        0.85,
        ge=0.5,
        le=1,
        description="Two rows are near-duplicates if they share at least this part of their three-word sequences "
        "(Jaccard similarity, computed exactly for candidate pairs from MinHash). 1: only rows with equal texts.",
    )
    decontaminate_against: str | None = Field(
        None,
        description="Path or URL of a file, folder or pattern with benchmark prompts: one prompt per line (txt), or "
        "rows (jsonl, json, csv, parquet) with a column prompt, question, instruction (and input), turns, messages or "
        "conversations. Rows with a turn that contains eight consecutive words of a prompt, or that equals a shorter "
        "prompt, are not used. Empty (default): no decontamination.",
    )
    decontaminate_column: str | None = Field(
        None,
        description="Column of the prompts in `decontaminate_against`. Empty (default): the first of those listed "
        "there. A file without any of them is refused.",
    )
    holdout_share: Share = Field(
        0.05,
        lt=1,
        description="Share of the rows that are held out from training to evaluate the adapter. A hash of its content "
        "decides whether a row, with its near-duplicates, is held out.",
    )
    eval_dataset: Dataset | None = Field(
        None,
        description="A dataset to evaluate on in place of a share of the rows, named as in `dataset`; its rows have "
        "the same format. Rows of `dataset` that equal or nearly equal one of them are not used for training. Empty "
        "(default): `holdout_share` counts.",
    )
    eval_split: str | None = Field(
        None,
        min_length=1,
        description="Split to evaluate on: of `eval_dataset`, or without `eval_dataset` another split of `dataset`. "
        "Empty (default): `test` of `eval_dataset`. In a JSON file with several lists of rows: the list of that name.",
    )
    eval_revision: str | None = Field(
        None,
        description="Branch, tag or commit of `eval_dataset` on the Hub. Empty (default): the newest commit. Each run "
        "pins the commit that it finds.",
    )
    max_holdout_rows: int = Field(
        500,
        ge=1,
        description="Maximum number of held-out rows to evaluate on. Of more rows a random sample is taken, by a hash "
        "of their content.",
    )


def dataset_ref(recipe: Data) -> DatasetRef:
    """Return the reference to a recipe's dataset that `include.data.sources` takes."""
    from include.data.sources import DatasetRef  # file systems and Hub clients; the engine does not need them

    return DatasetRef(recipe.dataset, recipe.dataset_config, recipe.dataset_split, recipe.dataset_revision)


def eval_ref(recipe: Data) -> DatasetRef | None:
    """Return the reference to the rows that a recipe evaluates on; None if it holds out a share of its dataset."""
    from include.data.sources import DatasetRef

    if recipe.eval_dataset:
        named, split = recipe.eval_split is not None, recipe.eval_split or "test"
        return DatasetRef(recipe.eval_dataset, None, split, recipe.eval_revision, "eval_dataset", named)
    if recipe.eval_split:
        config, revision = recipe.dataset_config, recipe.dataset_revision
        return DatasetRef(recipe.dataset, config, recipe.eval_split, revision, "eval_split", named_split=True)
    return None
