"""What each stage leaves behind: its files by name, and its metadata with types.

Other stages, the report, the model card, metrics and the approval page read these attributes and nothing else. Each
class belongs to the stage in its class argument. Names of files and folders are class variables. The fields are the
metadata, which is stored as JSON in the artifact's manifest.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from include.engine.jobs import TrainResult
from include.evaluation.gate import Verdict

CONTRACTS: dict[str, type[Contract]] = {}


class Contract(BaseModel):
    """Metadata of a stage's output. Subclasses name their stage: `class DownloadOutput(Contract, stage="download")`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init_subclass__(cls, stage: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if stage:
            CONTRACTS[stage] = cls

    @classmethod
    def __pydantic_init_subclass__(cls, stage: str = "", **options: Any) -> None:
        """Accept the class argument `stage`, which pydantic also passes here."""

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as plain JSON values."""
        return self.model_dump(mode="json")


class CheckResult(Contract):
    """The result of one data check over all rows."""

    check: str
    message: str
    severity: str
    rows: int
    limit: float | None
    passed: bool


class Bar(Contract):
    """One bar of a histogram: rows whose value is at most `upto` and above the bar before."""

    upto: int
    rows: int


class CopiedRow(Contract):
    """A row with exact copies: its number, the number of copies, and its first characters."""

    row: int
    copies: int
    begins: str


class Profile(Contract):
    """The usable rows in numbers: rows by number of turns, turns by role, rows by characters, rows by script."""

    turns: dict[str, int]
    roles: dict[str, int]
    characters: list[Bar]
    scripts: dict[str, int]
    top_duplicates: list[CopiedRow]


class TokenCounts(Contract):
    """Rows, tokens and trained tokens of one side (training or holdout), and the sha256 of its ids and labels.

    A conversation that `on_too_long: split` splits is several rows.
    """

    rows: int
    conversations: int
    tokens: int
    trained: int
    ids_sha256: str


class Answer(Contract):
    """A smoke-test prompt, both answers to it, and the failed checks, each with a sentence about the failure."""

    prompt: str
    system: str | None
    expect: str | None
    contains: str | None
    expect_json: dict[str, Any] | None
    answer: str
    base: str
    stopped: bool
    checks: dict[str, bool | None]
    failures: dict[str, str]


class OutOfMemoryEvent(Contract):
    """Training ran out of memory and went on with a smaller micro-batch."""

    what: str
    micro_batch: int


class LiveVersion(Contract):
    """The version that was live when the candidate was compared."""

    name: str
    revision: str


class PublishedVersion(Contract):
    """A version in a registry; see `include.registry.Version`."""

    name: str
    revision: str
    place: str
    content: str
    run: str | None


class MergedDistance(Contract):
    """The merged model against base and adapter: mean KL divergence (nats), share of positions with the same token."""

    kl: float
    same_tokens: float


class ResolveOutput(Contract, stage="resolve"):
    """The recipe with every revision pinned."""

    RECIPE: ClassVar = "recipe.json"


class MakeBaseOutput(Contract, stage="make_base"):
    """The base model of a demo in the artifact's folder. Losses are means over ten steps, in nats per token.

    A base that was taken from a package has a `source`; one that was pretrained has tokens and losses.
    """

    parameters: int
    seconds: float
    source: str | None = None
    tokens: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None


class DownloadOutput(Contract, stage="download"):
    """The rows as they came: `row` (int64, from 0) and `content` (one JSON document, bytes).

    The last `eval_rows` of the `rows` come from the evaluation dataset.
    """

    ROWS: ClassVar = "rows.parquet"

    rows: int
    eval_rows: int
    sha256: str
    notes: list[str] = []  # which files and which parts of them were read, and which were not


class ValidateOutput(Contract, stage="validate"):
    """Rows as conversations, the numbers of the good ones, and every refused or repaired row with its reasons.

    `unused` counts columns, keys of turns and keys of parts that are not used, most frequent first.
    """

    READINGS: ClassVar = "readings"
    GOOD: ClassVar = "good.parquet"
    QUARANTINE: ClassVar = "quarantine.jsonl"
    REPAIRED: ClassVar = "repaired.jsonl"
    DOCS: ClassVar = "data_docs"

    rows: int
    good: int
    refused: int
    copies: int
    repairs: dict[str, int]
    reasons: dict[str, int]
    unused: dict[str, int]
    checks: list[CheckResult]
    docs: str
    tools_rendered: bool
    profile: Profile


class StandardizeOutput(Contract, stage="standardize"):
    """The conversations that are used, for training or holdout, pairs of near-duplicates, and the rows left out with
    their reasons. Numbers count rows; `left_out_reasons` counts each row by its first reason.
    """

    MESSAGES: ClassVar = "messages"
    NEAR_DUPLICATES: ClassVar = "near_duplicates.jsonl"
    LEFT_OUT: ClassVar = "left_out.jsonl"

    train: int
    holdout: int
    near_duplicates: int
    leaking: int
    contaminated: int
    dropped: int
    left_out_reasons: dict[str, int]


class TemplateOutput(Contract, stage="template"):
    """Token ids and loss masks of both sides, the tokenizer with the chat template, ten rows as text, and the rows that
    do not train, or only in part, with their reasons. `left_out_reasons` counts each row by its first reason.
    """

    TRAIN: ClassVar = "train"
    HOLDOUT: ClassVar = "holdout"
    TOKENIZER: ClassVar = "tokenizer"
    SAMPLES: ClassVar = "samples.txt"
    LEFT_OUT: ClassVar = "left_out.jsonl"
    DOCS: ClassVar = "data_docs"

    train: TokenCounts
    holdout: TokenCounts
    too_long: int
    left_out: int
    left_out_reasons: dict[str, int]
    verified_rows: int
    encoder: str
    missing_special_tokens: list[str]
    new_special_tokens: dict[str, int]
    untrained_special_tokens: list[str]
    base_embeddings: int | None
    base_positions: int | None
    stop_tokens: list[int]
    template_sha256: str
    lengths: dict[str, int]
    histogram: list[Bar]
    samples: list[str]
    checks: list[CheckResult]
    docs: str


class TrainOutput(TrainResult, Contract, stage="train"):
    """The adapter (or the whole model) and the training log. Losses: means over the first and last ten log lines."""

    ADAPTER: ClassVar = "adapter"
    TRAINING_LOG: ClassVar = "training_log.jsonl"

    out_of_memory: list[OutOfMemoryEvent]


class SmokeTestOutput(Contract, stage="smoke_test"):
    """Answers of the adapter and of the base, with the result of each check; `failed` are sentences for the gate."""

    ANSWERS: ClassVar = "answers.json"

    answers: list[Answer]
    required: list[str]
    failed: list[str]
    passed: int


class EvaluateOutput(Contract, stage="evaluate"):
    """Holdout losses of base, candidate and live adapter (nats per token), and the gate's verdict.

    `losses.json` has the loss of each prepared row; `holdout_rows` counts whole conversations.
    """

    LOSSES: ClassVar = "losses.json"

    verdict: Verdict
    confidence: float
    margin: float
    holdout_rows: int
    live: LiveVersion | None


class ApproveOutput(Contract, stage="approve"):
    """Who approved the candidate and when (ISO 8601, UTC), or why nobody was asked."""

    asked: bool
    regressions: list[str]
    summary: str
    by: str | None = None
    at: str | None = None


class PublishOutput(PublishedVersion, stage="publish"):
    """The version that is live now, and the version of the merged model where the recipe asks for one."""

    merged: PublishedVersion | None = None


class VerifyOutput(Contract, stage="verify"):
    """Proof that the published version is the tested one: the largest difference of logits, and of the merged model."""

    largest_difference: float
    same_tokens: bool
    merged: MergedDistance | None = None
