"""Recipe fields: the smoke test and the gate, which decide whether a candidate goes live."""

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

    prompt: str = Field(min_length=1, description="The user's message.")
    system: str | None = Field(None, description="The system message. Empty (default): none.")
    expect: str | None = Field(
        None, description="A regular expression that must match somewhere in the answer; case is ignored."
    )
    contains: str | None = Field(None, min_length=1, description="A text that the answer must contain exactly.")
    expect_json: dict[str, Any] | None = Field(
        None,
        description="A JSON schema. The answer must be valid JSON for it; one ``` fence around the JSON is allowed.",
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
    """The prompts for the trained adapter, how answers are generated, and the checks that answers must pass."""

    prompts: list[Prompt] = Field(
        [Prompt.model_validate({"prompt": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,", "expect": r"\b13\b"})],
        min_length=1,
        description="Prompts of the smoke test. Each is a text, or an object with `prompt`, optionally `system`, and "
        "optionally what the answer must satisfy: `expect` (a regular expression), `contains` (a text), `expect_json` "
        "(a JSON schema).",
    )
    required_checks: list[AnswerCheck] = Field(
        ["not_empty", "no_special_tokens", "no_repetition", "no_echo", "as_expected"],
        description="Checks that every answer must pass before the adapter is published. The other checks are only "
        "reported. `stops` needs a large enough max_new_tokens; `differs_from_base` needs a base that answers "
        "differently.",
        examples=list(get_args(AnswerCheck)),
    )
    max_new_tokens: int = Field(128, ge=1, le=32768, description="Maximum length of an answer in tokens.")
    do_sample: bool = Field(
        False,
        description="Sample each token by its probability. Off (default): greedy decoding, and temperature, top_p, "
        "top_k and min_p have no effect.",
    )
    temperature: float = Field(
        1.5, gt=0, le=10, description="Sampling temperature. Above 1, less probable tokens are sampled more often."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the most probable tokens whose total probability is this. 1: from all.",
    )
    top_k: int = Field(50, ge=0, description="Sample from this number of the most probable tokens. 0: from all.")
    min_p: Share = Field(
        0.1, description="Do not sample tokens less probable than this share of the most probable one. 0: no limit."
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Above 1, tokens that already occur in the prompt or the answer are less probable.",
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="No sequence of this number of tokens occurs twice in prompt and answer. 0: no such rule."
    )
    num_beams: int = Field(1, ge=1, le=64, description="Number of beams of the beam search. 1: no beam search.")
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
    """The gate: whether a candidate is good enough to go live."""

    gate_margin: float = Field(
        0.0,
        ge=0,
        description="Loss increase against the live adapter that you accept (nats per token, mean over the holdout "
        "rows). 0 (default): the candidate must be significantly better. A tie (no row's loss differs by 0.001 nats "
        "per token or more) never replaces the live adapter.",
    )
    gate_confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Confidence level of the gate's bootstrap intervals. A sweep applies a Bonferroni correction: with "
        "four candidates and 0.95, each is tested at 0.9875.",
    )
    gate_prompt_control: bool = Field(
        False,
        description="Refuse a candidate whose answers do not depend on the prompt: its loss on a row's answers is no "
        "lower after their own prompt than after another row's. If questions and answers are shuffled, the loss still "
        "falls; only this check and prompts with `expect` detect it. Off (default): reported only.",
    )


def corrected_confidence(gate_confidence: float, candidates: int) -> float:
    """Return the confidence at which each of several candidates is tested, by a Bonferroni correction.

    The best of several candidates on the same holdout rows can be the best by chance. The correction keeps the
    probability that chance lets any of them through at 1 - `gate_confidence`.
    """
    return round(1 - (1 - gate_confidence) / candidates, 6)
