"""The generate job: answers to prompts, by what was trained and by the bare base, in a process that trained neither."""

from __future__ import annotations

from typing import Any

from include.engine.device_plan import make_plan
from include.engine.model import variants

# None may be left out: what is not said here, generate() takes from the base's own generation_config.json
DECODING = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
DRAWING = ("temperature", "top_p", "top_k", "min_p")  # mean something only with do_sample


def generate(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """Answer each prompt with the adapter (or the whole model that was trained) and with the base.

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
    named = DECODING + (DRAWING if recipe["do_sample"] else ())
    settings = GenerationConfig(
        eos_token_id=job["stop"], pad_token_id=job["pad"], **{name: recipe[name] for name in named}
    )

    def answers(model: Any) -> list[list[int]]:
        said = []
        for ids in job["prompts"]:
            prompt = torch.tensor([ids], device=plan.device)
            set_seed(recipe["seed"])
            output = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            said.append(output[0, len(ids) :].tolist())
        return said

    found = {}
    with torch.inference_mode():
        for name, model in variants(job["base"], {"adapter": job["adapter"]}, recipe, plan):
            found[name] = answers(model)
            say(f"{len(found[name])} answers by the {name}")
    return {**found, "plan": plan.as_dict()}
