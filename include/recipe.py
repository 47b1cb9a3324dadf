"""The recipe: one file that describes one model.

`Recipe` is the single source of the checks on a recipe file, of the checks on what is typed at trigger time, of the
trigger form and of the documentation of every field. Field names are those of the libraries that consume them.
The defaults are the reference recipe's: Unsloth's "Llama-3.2 (1B and 3B) Conversational" notebook.
"""

from __future__ import annotations

import itertools
import math
import re
import zoneinfo
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from include import json_schema
from include.errors import BadRecipe, Missing
from include.expectations import CHECKS
from include.settings import recipe_files

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULE_SETS = {"minimal": ["q_proj", "v_proj"], "standard": PROJECTIONS[:4], "comprehensive": PROJECTIONS}
Check = Literal[
    "not_empty", "stops", "no_special_tokens", "no_repetition", "no_echo", "differs_from_base", "as_expected"
]
Share = Annotated[float, Field(ge=0, le=1)]
TIMEOUT_HOURS = {  # of one try of a stage; generous, for what hangs without a word
    "resolve": 0.5, "pretrain": 2.0, "download": 6.0, "validate": 6.0, "standardize": 6.0, "template": 6.0,
    "train": 72.0, "smoke_test": 2.0, "evaluate": 6.0, "publish": 6.0, "verify": 4.0,
}  # fmt: skip
MOST_CANDIDATES = 64
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # what Airflow, file systems and the Hub all take


def _known(kind: str, values: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    if unknown := set(values) - set(names):
        raise ValueError(f"there is no {kind} '{unknown.pop()}' (there are: {', '.join(names)})")
    return values


class Prompt(BaseModel):
    """One prompt of the smoke test."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="What the user says.")
    system: str | None = Field(None, description="The system message, if any.")
    expect: str | None = Field(None, description="A regular expression that the answer must contain (case ignored).")
    contains: str | None = Field(
        None, min_length=1, description="A text that the answer must contain, letter by letter."
    )
    expect_json: dict[str, Any] | None = Field(
        None, description="A JSON schema: the answer must be JSON (it may stand in a ``` fence) that it holds for."
    )

    @field_validator("expect")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("expect_json")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            json_schema.check(schema)
        return schema


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


class Model(BaseModel):
    """The base model and how conversations are rendered for it."""

    base_model: str = Field(
        "unsloth/Llama-3.2-3B-Instruct",
        min_length=1,
        description="A model on the Hugging Face Hub (`owner/name`), a local folder, or `demo://little-llama`, which "
        "the project pretrains itself.",
    )
    base_revision: str | None = Field(
        None, description="Branch, tag or commit of the base model. Empty: the newest; a run pins what it found."
    )
    chat_template: Literal["llama-3.1", "llama-3", "chatml", "alpaca", "vicuna", "tokenizer"] = Field(
        "llama-3.1", description="How a conversation is rendered; `tokenizer` takes the one of the base's tokenizer."
    )
    missing_special_tokens: Literal["refuse", "split"] = Field(
        "refuse",
        description="When the template writes special tokens that the base's vocabulary lacks: refuse the run, or let "
        "them be split into ordinary tokens, with a warning in log, report and model card.",
    )
    special_tokens_in_text: Literal["literal", "parse"] = Field(
        "literal",
        description="What becomes of a turn's text that looks like a special token: `literal` keeps it as the "
        "characters that it is; `parse` makes the token of it, for data that is written so on purpose.",
    )
    max_seq_length: int = Field(
        2048, ge=16, le=1_048_576, description="Longest conversation in tokens; see on_too_long."
    )
    on_too_long: Literal["drop", "split", "truncate"] = Field(
        "drop",
        description="What becomes of a longer conversation (it is counted anyway): `drop` leaves it out; `split` makes "
        "several of it, between exchanges, each with the system message; `truncate` keeps its first tokens.",
    )
    load_in_4bit: bool = Field(True, description="Load the frozen base in 4 bits (nf4, double quantization): QLoRA.")
    load_in_8bit: bool = Field(
        False, description="Load it in 8 bits (set load_in_4bit to false, too). With neither, it is loaded in 16 bits."
    )


class Lora(BaseModel):
    """The adapter."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter.")
    lora_alpha: int = Field(16, ge=1, le=4096, description="Scale of the adapter: updates are multiplied by alpha/r.")
    lora_dropout: Share = Field(0.0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        PROJECTIONS,
        min_length=1,
        description="The projections that get an adapter; or the name of a set: `minimal` (q, v), `standard` (q, k, v, "
        "o), `comprehensive` (and gate, up, down).",
        examples=[*MODULE_SETS, *PROJECTIONS],
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained, too.")
    use_rslora: bool = Field(False, description="Scale updates by alpha/sqrt(r) (rank-stabilized LoRA).")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _named_sets(cls, modules: Any) -> Any:
        names = [modules] if isinstance(modules, str) else modules
        if not isinstance(names, list):
            return modules
        found = [module for name in names for module in MODULE_SETS.get(str(name), [name])]
        return list(dict.fromkeys(found))


class Training(BaseModel):
    """How the adapter is trained."""

    method: Literal["sft", "dpo"] = Field(
        "sft",
        description="`sft`: supervised fine-tuning on the assistant's turns; `dpo`: direct preference optimization on "
        "rows with a prompt, a chosen and a rejected answer. It wants a learning_rate of some 1e-6 to 1e-5.",
    )
    beta: float = Field(0.1, gt=0, le=10, description="DPO's beta: the higher, the nearer to the base it stays.")
    full_finetuning: bool = Field(
        False,
        description="Train the whole model in place of an adapter (set load_in_4bit to false, too). What is published "
        "is then a model.",
    )
    engine: Literal["auto", "unsloth", "transformers"] = Field(
        "auto",
        description="`unsloth` needs a supported GPU; `transformers` (with PEFT and bitsandbytes) runs anywhere;"
        " `auto` takes Unsloth where there is a GPU for it.",
    )
    per_device_train_batch_size: int = Field(2, ge=1, le=4096, description="Conversations per device and micro-step.")
    gradient_accumulation_steps: int = Field(4, ge=1, le=4096, description="Micro-steps per optimizer step.")
    max_steps: int = Field(60, ge=-1, description="Optimizer steps; -1: as many as num_train_epochs asks for.")
    num_train_epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the data, when max_steps is -1.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Highest learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("linear", description="How the learning rate falls after the warm-up.")
    warmup_steps: int = Field(5, ge=0, description="Steps over which the learning rate rises.")
    optim: Literal[
        "adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "adafactor", "lion_8bit"
    ] = Field(
        "adamw_8bit",
        description="Optimizer. Without a GPU, adamw_torch takes the place of the 8-bit and fused ones.",
    )  # fmt: skip
    weight_decay: float = Field(0.01, ge=0, le=1, description="Weight decay.")
    packing: bool = Field(False, description="Put several conversations into one sequence of max_seq_length.")
    save_steps: int = Field(20, ge=1, description="A checkpoint every so many steps; a killed run loses no more.")
    logging_steps: int = Field(1, ge=1, description="A line in the training log every so many steps.")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Measure the holdout loss at every checkpoint, stop when it has not fallen so many times in a row, "
        "and keep the best checkpoint. Empty: train to the end.",
    )
    report_to: list[Literal["mlflow", "tensorboard", "wandb", "trackio"]] = Field(
        [],
        description="Also send the training log there; the package must be installed on the gpu queue's worker.",
        examples=["mlflow", "tensorboard", "wandb", "trackio"],
    )
    fit_device: bool = Field(
        True,
        description="On a GPU, choose conversations per micro-step and gradient checkpointing by the device's memory; "
        "their product with the accumulation stays. Off: exactly what is written here.",
    )
    num_processes: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of the worker that train together (torchrun). The effective batch stays what batch size and "
        "accumulation say, and must be a multiple of this.",
    )
    device_memory_gb: float | None = Field(
        None, gt=0, description="Use no more of the GPU's memory than this (GiB). Empty: all that is free."
    )
    hang_timeout: int = Field(
        1800,
        ge=10,
        description="Seconds without a sign of life after which the training process is ended and the task retried.",
    )
    seed: int = Field(3407, ge=0, le=2**31 - 1, description="Seed of adapter, data order and sampling.")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {},
        description="Several values for fields of LoRA and Training, for example `learning_rate: [1.0e-4, 2.0e-4]`. "
        f"Every combination (at most {MOST_CANDIDATES}) is trained and measured; the best candidate goes on to the "
        "gate.",
    )


class SmokeTest(BaseModel):
    """The questions put to the freshly trained adapter, and the gate's demands on the answers."""

    prompts: list[Prompt] = Field(
        [Prompt.model_validate({"prompt": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,", "expect": r"\b13\b"})],
        min_length=1,
        description="Prompts of the smoke test: a list of texts, or of {prompt, system} with what the answer must be "
        "like: {expect, contains, expect_json}.",
    )
    required_checks: list[Check] = Field(
        ["not_empty", "no_special_tokens", "no_repetition", "no_echo", "as_expected"],
        description="Checks that every answer must pass for the adapter to be published; the others are reported. "
        "`stops` counts on a max_new_tokens that is long enough, `differs_from_base` on a base that does worse.",
        examples=list(get_args(Check)),
    )
    max_new_tokens: int = Field(128, ge=1, le=32768, description="Longest answer in tokens.")
    do_sample: bool = Field(
        False,
        description="Draw each token by its likelihood instead of taking the likeliest; temperature, top_p, top_k and "
        "min_p count only then.",
    )
    temperature: float = Field(1.5, gt=0, le=10, description="Above 1, unlikely tokens are drawn more often.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that have this share together.")
    top_k: int = Field(50, ge=0, description="Draw among so many of the likeliest tokens; 0: among all.")
    min_p: Share = Field(0.1, description="Drops tokens less likely than this share of the likeliest.")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Above 1, tokens that have been there, also in the prompt, become less likely."
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="No sequence of so many tokens comes twice, prompt included; 0: any may."
    )
    num_beams: int = Field(1, ge=1, le=64, description="Beams of the beam search; 1: none.")

    @field_validator("prompts", mode="before")
    @classmethod
    def _texts(cls, prompts: Any) -> Any:
        return [{"prompt": p} if isinstance(p, str) else p for p in prompts] if isinstance(prompts, list) else prompts


class Gate(BaseModel):
    """What decides whether a candidate goes live."""

    gate_margin: float = Field(
        0.0,
        ge=0,
        description="By how much (nats per token, mean over holdout rows) a candidate may be worse than the live "
        "adapter and still replace it; 0: it must be measurably better. One that does as the live one does never "
        "replaces it.",
    )
    gate_confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Confidence of the gate's bootstrap intervals. The candidates of a sweep share the doubt: of four, "
        "each is judged at 0.9875 where this is 0.95.",
    )
    gate_questions_matter: bool = Field(
        False,
        description="Refuse a candidate to which an answer is as likely after another row's question as after its own: "
        "so it is when the data's questions and answers were mixed up. Off: it is only reported, for little models and "
        "for data whose answers hardly depend on the question.",
    )


class Publishing(BaseModel):
    """Where the adapter goes."""

    registry: str | None = Field(
        None,
        pattern=r"^(file://|hf://[^/]+/[^/]+$|(s3|gs|az|abfs)://[^/]+/.)",
        description="`hf://owner/name` for the Hugging Face Hub, `s3://bucket/path` for an object store (also `gs`, "
        "`az`, `abfs`), or `file:///folder`. Empty: a folder of the recipe's name under `RETUNE_REGISTRY`, by default "
        "under `var/registry`.",
    )
    private: bool = Field(True, description="Create the Hub repository as a private one.")
    approve: Literal["always", "on_regression", "never"] = Field(
        "never",
        description="Whether a person must approve what the gate let through: `always`, or only when something of it "
        "is worse than what is live (`on_regression`). The run waits in Airflow, under Required Actions.",
    )
    approve_within_hours: float = Field(
        24.0, gt=0, le=8760, description="Without an answer for so long, nothing is published."
    )
    merged_16bit: bool = Field(
        False,
        description="Also publish base and adapter merged into one model of 16 bits, beside the adapter as "
        "`<registry>-merged`: vLLM and others load it as it is.",
    )


class Operations(BaseModel):
    """When the recipe runs by itself, who is told what, what is kept. The recipe file's alone: not in the form, and no
    part of what a model is made of.
    """

    cron: str | None = Field(
        None, description="Run at these times: five fields, or @daily and the like. A run with nothing new is skipped."
    )
    timezone: str = Field("UTC", description="Time zone of cron, for example Europe/Berlin.")
    watch: bool = Field(False, description="Run whenever the dataset has a new revision.")
    watch_every: float = Field(300.0, ge=1, description="Seconds between two looks at the dataset's revision.")
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="Above so many rows, `standardize` and `template` are shared by all CPU workers, in shards of so "
        "many rows (in steps of 5,000, and at most 1,000 shards). Empty: one worker does all. The result is the same.",
    )
    deadline_hours: float | None = Field(
        None, gt=0, description="Tell those in alert_* when a run has not ended so long after it was queued."
    )
    timeout_hours: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="For single stages, the hours after which a try is ended and the stage tried again; in place of "
        + ", ".join(f"{stage} {hours:g}" for stage, hours in TIMEOUT_HOURS.items())
        + ".",
    )
    alert_on: list[Literal["failed", "refused", "published", "late"]] = Field(
        ["failed", "refused", "published", "late"], description="What alert_mail and alert_webhooks are told."
    )
    alert_mail: list[str] = Field(
        [], description="Mail addresses, written to through the Airflow connection `smtp_default`."
    )
    alert_webhooks: list[str] = Field(
        [], description="Airflow connections, each with the address of a Slack-compatible webhook."
    )
    keep_days: int = Field(
        30,
        ge=1,
        description="What no run of the last so many days has used is removed by the DAG `maintenance`; what is live, "
        "published or in use never is.",
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, expression: str | None) -> str | None:
        if expression is not None:
            from croniter import croniter  # not where only the engine runs

            if not croniter.is_valid(expression):
                raise ValueError("not a cron expression (minute hour day month weekday)")
        return expression

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError("there is no such time zone")
        return name

    @field_validator("timeout_hours")
    @classmethod
    def _known_stages(cls, hours: dict[str, float]) -> dict[str, float]:
        return _known("stage", hours, TIMEOUT_HOURS)


class Recipe(Data, Model, Lora, Training, SmokeTest, Gate, Publishing, Operations):
    """One model: its data, its base, its adapter, how it is trained, tested and published."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=NAME, description="Name of the recipe, of its file and of its DAG.")
    description: str = Field("", description="One sentence for the DAG's page.")

    @field_validator("check_limits")
    @classmethod
    def _known_checks(cls, limits: dict[str, float]) -> dict[str, float]:
        return _known("check", limits, CHECKS)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a number of steps, or -1 to train num_train_epochs")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them to false")
        if self.full_finetuning and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("full_finetuning needs a base in 16 bits: set load_in_4bit and load_in_8bit to false")
        if self.full_finetuning and self.merged_16bit:
            raise ValueError("full_finetuning publishes a whole model already: set merged_16bit to false")
        if self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_processes:
            raise ValueError(
                f"num_processes is {self.num_processes}: per_device_train_batch_size x gradient_accumulation_steps is "
                "no multiple of it"
            )
        if self.method == "dpo" and (self.packing or self.on_too_long != "drop"):
            raise ValueError("method is dpo: its pairs cannot be packed, and on_too_long must be drop")
        if self.engine == "unsloth" and (self.method == "dpo" or self.full_finetuning or self.num_processes > 1):
            raise ValueError("engine is unsloth, which trains an adapter by sft on one GPU: set engine to auto")
        return self

    @model_validator(mode="after")
    def _sweeps(self) -> Recipe:
        known = [name for name in (*Lora.model_fields, *Training.model_fields) if name not in ("sweep", "method")]
        if unknown := set(self.sweep) - set(known):
            raise ValueError(
                f"sweep: '{unknown.pop()}' is no field of LoRA or Training (there are: {', '.join(known)})"
            )
        if (count := math.prod(map(len, self.sweep.values()))) > MOST_CANDIDATES:
            raise ValueError(f"sweep has {count} combinations, at most {MOST_CANDIDATES} are trained")
        if self.sweep:
            try:
                self.candidates()
            except ValidationError as error:
                raise ValueError("sweep: " + "; ".join(_say(e) for e in error.errors())) from None
        return self

    def candidates(self) -> dict[str, Recipe]:
        """The recipe once for each combination of the sweep's values, without a sweep, by what tells it apart.

        The best of many tries on the same holdout rows may be the best by luck. So each is judged at a confidence that
        keeps the chance that luck lets any of them through at what the recipe's gate_confidence allows (Bonferroni).

        Raises:
            ValidationError: a value is wrong for its field.
        """
        combinations = list(itertools.product(*self.sweep.values()))
        confidence = round(1 - (1 - self.gate_confidence) / len(combinations), 6)
        own = self.model_dump(mode="json") | {"sweep": {}, "gate_confidence": confidence}
        recipes = [Recipe.model_validate(own | dict(zip(self.sweep, values, strict=True))) for values in combinations]
        return {
            " ".join(f"{name}={_short(getattr(recipe, name))}" for name in self.sweep) or "as written": recipe
            for recipe in recipes
        }

    @property
    def made_of(self) -> dict[str, Any]:
        """Every field that decides what the model is made of, as plain JSON values; operations left out."""
        return self.model_dump(mode="json", exclude=set(Operations.model_fields))

    def part(self, fields: Iterable[str]) -> dict[str, Any]:
        """The named fields as plain JSON values: what a stage's fingerprint depends on."""
        return self.model_dump(mode="json", include=set(fields))


SECTIONS: dict[str, type[BaseModel]] = {
    "Data": Data,
    "Model": Model,
    "LoRA": Lora,
    "Training": Training,
    "Smoke test": SmokeTest,
    "Gate": Gate,
    "Publishing": Publishing,
}


def check(values: dict[str, Any], where: str) -> Recipe:
    """The values as a recipe.

    Raises:
        BadRecipe: names every wrong field, its value and what is expected there.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadRecipe(f"{where}: " + "; ".join(_say(e) for e in error.errors()), "Correct it and run again") from None


def _say(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        near = _nearest(field)
        return f"unknown field '{field}'" + (f" (did you mean '{near}'?)" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{message}" if field == "recipe" else f"field '{field}': {message}, got {error['input']!r}"


def _short(value: Any) -> str:
    """A field's value for a candidate's label; a known set of projections by its name."""
    names = [name for name, modules in MODULE_SETS.items() if modules == value]
    if isinstance(value, list):
        return names[0] if names else "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _nearest(field: str) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(field, Recipe.model_fields, n=1)), None)


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, with the values given at trigger time in place of the file's.

    Raises:
        Missing: there is no such file.
        BadRecipe: the file is not YAML, or a field is unknown, of the wrong type or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Missing(f"the recipe file {path} cannot be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise BadRecipe(f"{path} is not a YAML file: {problem}", "Correct the line it names") from None
    if not isinstance(values, dict):
        raise BadRecipe(f"{path} holds no fields", "Write `field: value` lines, see include/recipes/demo.yaml")
    if (overrides or {}).get("sweep") and not values.get("sweep"):
        raise BadRecipe(
            f"{path}: field 'sweep': the file has none, so its DAG trains one candidate",
            "Write a sweep into the file; then other values may be given for a run",
        )
    return check({"name": path.stem, **values, **(overrides or {})}, str(path))


def typed(pairs: Iterable[str]) -> dict[str, Any]:
    """`field=value` texts as typed values, read as YAML reads them.

    Raises:
        BadRecipe: a text has no equals sign, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        try:
            values[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise BadRecipe(f"'{pair}' is not field=value", "Write for example --set max_steps=20")
    return values


def find(name_or_path: str) -> Path:
    """The file of a recipe that is given by name, or by path.

    Raises:
        Missing: lists the recipes that there are.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).resolve()
        if path.is_file():
            return path
        raise Missing(f"there is no recipe file {path}", "Check the path")
    files = {file.stem: file for file in recipe_files()}
    if name_or_path not in files:
        raise Missing(f"there is no recipe '{name_or_path}'", f"Choose one of: {', '.join(sorted(files))}; or a path")
    return files[name_or_path]


def form(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each field: its value in this recipe, and the JSON schema and section that the trigger form shows.

    The schema is pydantic's own, with `anyOf [X, null]` folded into `type: [X, null]`, which the form understands.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    values = recipe.model_dump(mode="json")
    fields = {}
    for section, model in SECTIONS.items():
        for name in model.model_fields:
            if name == "sweep" and not recipe.sweep:
                continue  # the DAG of such a recipe has one train task, not a mapped one
            entry = dict(schema["properties"][name])
            if "anyOf" in entry:
                kinds = entry.pop("anyOf")
                for kind in kinds:
                    entry.update({key: value for key, value in kind.items() if key != "type"})
                entry["type"] = [kind["type"] for kind in kinds]
            if entry.get("items", {}).get("$ref"):
                entry["items"] = definitions[entry["items"]["$ref"].rsplit("/", 1)[-1]]
            entry.pop("default", None)
            entry["description_md"] = entry.pop("description")
            fields[name] = {"value": values[name], "section": section, "schema": {**entry, "title": name}}
    return fields
