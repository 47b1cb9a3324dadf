"""What decides whether a candidate goes live: smoke test and gate."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from include.recipe import json_schema
from include.recipe.data import Share
from include.recipe.reserved import GENERATION_DECIDED, GENERATION_INSTEAD, refuse_reserved

AnswerCheck = Literal[
    "not_empty", "stops", "no_special_tokens", "no_repetition", "no_echo", "differs_from_base", "as_expected"
]


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
            json_schema.check_schema(schema)
        return schema


class SmokeTest(BaseModel):
    """The questions put to the freshly trained adapter, and the gate's demands on the answers."""

    prompts: list[Prompt] = Field(
        [Prompt.model_validate({"prompt": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,", "expect": r"\b13\b"})],
        min_length=1,
        description="Prompts of the smoke test: a list of texts, or of {prompt, system} with what the answer must be "
        "like: {expect, contains, expect_json}.",
    )
    required_checks: list[AnswerCheck] = Field(
        ["not_empty", "no_special_tokens", "no_repetition", "no_echo", "as_expected"],
        description="Checks that every answer must pass for the adapter to be published; the others are reported. "
        "`stops` counts on a max_new_tokens that is long enough, `differs_from_base` on a base that does worse.",
        examples=list(get_args(AnswerCheck)),
    )
    max_new_tokens: int = Field(128, ge=1, le=32768, description="Longest answer in tokens.")
    do_sample: bool = Field(
        False,
        description="Sample each token by its probability instead of taking the most probable one; temperature, top_p, "
        "top_k and min_p have an effect only then.",
    )
    temperature: float = Field(1.5, gt=0, le=10, description="Above 1, improbable tokens are sampled more often.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens that together have this probability."
    )
    top_k: int = Field(50, ge=0, description="Sample from this many of the most probable tokens; 0: from all.")
    min_p: Share = Field(0.1, description="Drop tokens whose probability is below this share of the highest one.")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Above 1, tokens that occurred before, also in the prompt, become less probable."
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="No sequence of this many tokens occurs twice, prompt included; 0: no limit."
    )
    num_beams: int = Field(1, ge=1, le=64, description="Beams of the beam search; 1: none.")
    generation_arguments: dict[str, Any] = Field(
        {},
        description="Any other argument of transformers' GenerationConfig, for example `{min_new_tokens: 16}`. An "
        "argument that has a field here, or that Retune decides, is refused.",
    )

    @field_validator("generation_arguments")
    @classmethod
    def _no_reserved_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        refuse_reserved(arguments, cls.model_fields, GENERATION_INSTEAD, GENERATION_DECIDED)
        return arguments

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
