"""The generate job: answers to prompts, by the adapter and by the bare base, in a process that trained neither."""

from __future__ import annotations

from typing import Any

from include.engine.model import load_adapter, load_base
from include.engine.plan import make_plan

# None may be left out: what is not said here, generate() takes from the base's own generation_config.json
DECODING = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
DRAWING = ("temperature", "top_p", "top_k", "min_p")  # mean something only with do_sample


def generate(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """Answer each prompt with the adapter and with the base.

    Args:
        job: `recipe`, `base`, `adapter` (folders), `prompts` (list of token ids), `stop` (ids that end an answer),
            `pad` (id).

    Returns:
        `adapter` and `base`: for each prompt the ids of the answer, without the prompt; `plan`.
    """
    plan = make_plan({**job["recipe"], "engine": "transformers"})
    import torch
    from transformers import GenerationConfig, set_seed

    recipe = job["recipe"]
    model = load_adapter(load_base(job["base"], recipe, plan), job["adapter"])
    model.eval()
    named = DECODING + (DRAWING if recipe["do_sample"] else ())
    settings = GenerationConfig(
        eos_token_id=job["stop"], pad_token_id=job["pad"], **{name: recipe[name] for name in named}
    )

    def answers() -> list[list[int]]:
        found = []
        for ids in job["prompts"]:
            prompt = torch.tensor([ids], device=plan.device)
            set_seed(recipe["seed"])
            output = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            found.append(output[0, len(ids) :].tolist())
        return found

    with torch.inference_mode():
        adapted = answers()
        say(f"{len(adapted)} answers by the adapter")
        with model.disable_adapter():
            base = answers()
    return {"adapter": adapted, "base": base, "plan": plan.as_dict()}
