"""The engine's jobs and their results: one class for each command, typed on both sides of the process boundary.

A job carries a recipe, or a view of one (`include.recipe.RecipeView`): only the fields that it holds can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from include.engine.device_plan import Device, Plan
from include.recipe import AnyRecipe

R = TypeVar("R")
Ids = list[int]  # token ids of one sequence
CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="strings")  # JSON has no NaN, and a loss may be one


class Progress(Protocol):
    """Take a line for people; an empty line is a sign of life only."""

    def __call__(self, line: str, *, training: bool = False, checkpoint: Path | None = None) -> None:
        """Pass it on.

        Args:
            training: the first step is done, so that imports, loading and compilation are over.
            checkpoint: folder of a checkpoint that has just been saved in full.
        """


class Job(Generic[R]):
    """The arguments of an engine command whose result is an `R`."""

    command: ClassVar[str]

    @classmethod
    def from_json(cls, content: bytes) -> Job[R]:
        """Return the job that `to_json` serialized.

        Raises:
            pydantic.ValidationError: it is not a job of this class.
        """
        return TypeAdapter(cls).validate_json(content)

    def to_json(self) -> bytes:
        """Return the job as JSON; of its recipe the fields that it holds."""
        return TypeAdapter(type(self)).dump_json(self)

    def result_from_json(self, content: bytes) -> R:
        """Return the result that `result_to_json` serialized."""
        return self._result_adapter().validate_json(content)

    def result_to_json(self, result: R) -> bytes:
        """Return the job's result as JSON."""
        return self._result_adapter().dump_json(result)

    def _result_adapter(self) -> TypeAdapter[R]:
        base: Any = type(self).__orig_bases__[0]  # type: ignore[attr-defined]
        return TypeAdapter(get_args(base)[0])


class TrainResult(BaseModel):
    """The outcome of a training.

    Attributes:
        steps: optimizer steps.
        resumed_from: name of the checkpoint that the last try began from.
        seconds: of training, over all tries; without loading the model.
        tokens_per_second, tokens: without padding, over all tries.
        first_losses, last_losses: mean of the first and of the last ten entries of the training log; of fewer than 20,
            of the first and the last half.
        peak_memory_bytes: of the device, or of the process where there is no GPU.
    """

    model_config = CONFIG | ConfigDict(frozen=True)

    plan: Plan
    steps: int
    resumed_from: str | None
    seconds: float
    tokens_per_second: float
    tokens: int
    first_losses: float
    last_losses: float
    trainable_parameters: int
    peak_memory_bytes: int


@dataclass(frozen=True, config=CONFIG)
class TrainJob(Job[TrainResult]):
    """Train an adapter, or a whole model; go on from the newest whole checkpoint in `out`.

    Attributes:
        base: folder of the base model.
        base_name, base_revision: what the adapter's config names as its base.
        tokenizer: folder of the tokenizer.
        rows, holdout: files of rows, see `include.chat.tokenized`.
        out: folder of checkpoints, training log and adapter.
        run_name: what trackers (`report_to`) call the run.
        micro_batch: the largest one that may be tried, after a larger one did not fit into memory.
        new_tokens: ids of tokens whose embeddings are trained.
    """

    command: ClassVar[str] = "train"
    recipe: AnyRecipe
    base: Path
    base_name: str
    base_revision: str | None
    tokenizer: Path
    rows: list[Path]
    holdout: list[Path]
    out: Path
    run_name: str
    micro_batch: int | None = None
    new_tokens: list[int] = Field(default_factory=list)


@dataclass(frozen=True, config=CONFIG)
class GenerateResult:
    """For each prompt the ids of the answer, without the prompt: by what was trained, and by the base."""

    adapter: list[Ids]
    base: list[Ids]


@dataclass(frozen=True, config=CONFIG)
class GenerateJob(Job[GenerateResult]):
    """Answer prompts with an adapter (or the whole model that was trained) and with the base.

    Attributes:
        base, adapter: folders.
        prompts: token ids.
        stop: ids that end an answer.
        pad: id of the padding token, if the tokenizer has one.
        new_tokens: ids that the base may lack.
    """

    command: ClassVar[str] = "generate"
    recipe: AnyRecipe
    base: Path
    adapter: Path
    prompts: list[Ids]
    stop: list[int]
    pad: int | None
    new_tokens: list[int] = Field(default_factory=list)


@dataclass(frozen=True, config=CONFIG)
class LossesResult:
    """Losses of holdout rows.

    Attributes:
        row: numbers of the rows in the dataset.
        tokens: trained tokens of each row.
        losses: for `base` and for each adapter the loss of each row, nats.
        device: where they were measured.
    """

    row: list[int]
    tokens: list[int]
    losses: dict[str, list[float]]
    device: Device


@dataclass(frozen=True, config=CONFIG)
class LossesJob(Job[LossesResult]):
    """Measure the loss of each row by the base and by adapters or whole models.

    Attributes:
        base: folder of the base model.
        rows: files of rows, see `include.chat.tokenized`.
        max_rows: measure the first so many of them.
        adapters: folders by name.
        new_tokens: ids that the base may lack.
    """

    command: ClassVar[str] = "losses"
    recipe: AnyRecipe
    base: Path
    rows: list[Path]
    max_rows: Annotated[int, Field(ge=1)]
    adapters: dict[str, Path]
    new_tokens: list[int] = Field(default_factory=list)


@dataclass(frozen=True, config=CONFIG)
class LogitsResult:
    """Difference of two copies of an adapter.

    Attributes:
        largest_difference: of the logits, over all positions.
        same_tokens: whether the likeliest tokens agree everywhere.
    """

    largest_difference: float
    same_tokens: bool


@dataclass(frozen=True, config=CONFIG)
class LogitsJob(Job[LogitsResult]):
    """Compare the logits of a tested and of a published adapter (folders) on the same prompts (token ids), of which
    `new_tokens` may be missing in the base."""

    command: ClassVar[str] = "logits"
    recipe: AnyRecipe
    base: Path
    tested: Path
    published: Path
    prompts: list[Ids]
    new_tokens: list[int] = Field(default_factory=list)


@dataclass(frozen=True, config=CONFIG)
class MergeResult:
    """The merged model's type of weights, as torch names it."""

    dtype: str


@dataclass(frozen=True, config=CONFIG)
class MergeJob(Job[MergeResult]):
    """Write the model that base and adapter make together into the folder `out`."""

    command: ClassVar[str] = "merge"
    base: Path
    adapter: Path
    out: Path


@dataclass(frozen=True, config=CONFIG)
class MergedLogitsResult:
    """Difference of a merged model from base and adapter.

    Attributes:
        kl: mean Kullback-Leibler divergence over all positions, nats.
        same_tokens: share of positions where the likeliest token is the same.
    """

    kl: float
    same_tokens: float


@dataclass(frozen=True, config=CONFIG)
class MergedLogitsJob(Job[MergedLogitsResult]):
    """Compare a merged model with base and adapter (folders) on the same prompts (token ids)."""

    command: ClassVar[str] = "merged_logits"
    base: Path
    adapter: Path
    merged: Path
    prompts: list[Ids]


JOBS: dict[str, type[Job[Any]]] = {
    job.command: job for job in (TrainJob, GenerateJob, LossesJob, LogitsJob, MergeJob, MergedLogitsJob)
}
