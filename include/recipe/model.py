"""The base model and its chat template."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


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
    load_in_4bit: bool = Field(True, description="Load the pinned base in 4 bits (nf4, double quantization): QLoRA.")
    load_in_8bit: bool = Field(
        False, description="Load it in 8 bits (set load_in_4bit to false, too). With neither, it is loaded in 16 bits."
    )
