"""Load published models and tokenizers as their users do. Runs in this environment and in one with older packages.

It imports nothing of the project: `python -m tests.services.loading` reads jobs as JSON and prints what it found.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a model and a tokenizer compute.

    Args:
        job: `model` (folder, or absent), `adapter` (folder, or absent), `ids` (a prompt), `tokenizer` (folder, or
            absent), `messages` (a conversation), `text`.

    Returns:
        `versions`; of the model `dtype` of its weights, `logits` (positions x vocabulary, computed in 32 bits) and
        `answer` (four tokens, greedy); of the tokenizer `rendered`, `ids`, `inputs`, `decoded` and `named`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, Any] = {"versions": {name: version(name) for name in ("transformers", "peft", "torch")}}
    model: Any = None
    with torch.inference_mode():
        if "model" in job:
            model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
            found["dtype"] = str(model.dtype)
            model = model.float().eval()
            if "adapter" in job:
                from peft import PeftModel

                size = len(AutoTokenizer.from_pretrained(job["tokenizer"])) if "tokenizer" in job else 0
                if size > model.get_input_embeddings().num_embeddings:
                    model.resize_token_embeddings(size)  # as the card says
                model = PeftModel.from_pretrained(model, job["adapter"]).eval()
            ids = torch.tensor([job["ids"]])
            found["logits"] = model(input_ids=ids).logits[0].tolist()
            answer = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            found["answer"] = answer[0, ids.shape[1] :].tolist()
        if "tokenizer" in job:
            tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
            inputs = tokenizer(job["text"], return_tensors="pt")
            if model is not None:
                model.generate(**inputs, max_new_tokens=1)  # fails for inputs that the model does not take
            messages, today = job["messages"], {"date_string": "26 Jul 2024"}  # some templates write the day
            found |= {
                "rendered": tokenizer.apply_chat_template(
                    messages[:-1], tokenize=False, add_generation_prompt=True, **today
                ),
                "ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **today),
                "inputs": {name: value.tolist() for name, value in inputs.items()},
                "decoded": tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True),
                "named": {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")},
            }
    return found


if __name__ == "__main__":
    print(json.dumps([load(job) for job in json.load(sys.stdin)]))
