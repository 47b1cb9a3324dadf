"""Where the conversations come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Share = Annotated[float, Field(ge=0, le=1)]


class Data(BaseModel):
    """Where the conversations come from and what is done with bad ones."""

    dataset: str = Field(
        "mlabonne/FineTome-100k",
        min_length=1,
        description="A dataset on the Hugging Face Hub (`owner/name`), or a path or URL of a parquet, jsonl(.gz), "
        "json or csv file.",
    )
    dataset_format: Literal["sharegpt", "alpaca"] = Field(
        "sharegpt",
        description="`sharegpt`: rows with a list of turns; `alpaca`: rows with instruction, input and output (or "
        "response), which become conversations of one exchange. Rows of the other kind are refused.",
    )
    dataset_config: str | None = Field(None, description="The Hub dataset's configuration, where it has several.")
    dataset_split: str = Field("train", min_length=1, description="The Hub dataset's split.")
    dataset_revision: str | None = Field(
        None, description="Branch, tag or commit of the Hub dataset. Empty: the newest; a run pins what it found."
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first so many rows. Empty: all.")
    merge_turns: bool = Field(
        False, description="Join turns of one role that follow each other; otherwise such a row is refused."
    )
    max_refused_share: Share = Field(0.05, description="The run fails when validation refuses more than this share.")
    check_limits: dict[str, Share] = Field(
        {},
        description="For single checks, the share of rows that may fail them before the run fails, for example "
        "`special_token_text: 0`. The names stand in the report.",
    )
    near_duplicates: Literal["report", "drop"] = Field(
        "report",
        description="What becomes of a row that says nearly the same as an earlier one. Such a row never trains when "
        "the other is held out.",
    )
    near_duplicate_similarity: float = Field(
        0.85,
        ge=0.5,
        le=1,
        description="From which share of common three-word sequences two rows are near-duplicates (MinHash estimate).",
    )
    decontaminate_against: str | None = Field(
        None,
        description="A file of benchmark prompts (jsonl, json, csv, parquet: a text column or conversations; txt: one "
        "for each line). Rows that contain one, or eight of its words in a row, do not train.",
    )
    holdout_share: Share = Field(0.05, lt=1, description="Share of rows kept out of training, to measure the adapter.")
    max_holdout_rows: int = Field(500, ge=1, description="No more holdout rows than this are measured.")
