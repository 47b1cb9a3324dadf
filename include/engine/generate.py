"""The generate job: answers to prompts, by what was trained and by the bare base, in a process that trained neither."""

from __future__ import annotations

from typing import Any

from include.engine.arguments import generation_config
from include.engine.device_plan import find_device
from include.engine.jobs import GenerateJob, GenerateResult, Ids, Progress
from include.engine.model import variants, weight_bits


def generate(job: GenerateJob, progress: Progress) -> GenerateResult:
    """Answer each prompt with the adapter (or the whole model that was trained) and with the base.

    Raises:
        NotFound: the base or the adapter cannot be loaded.
    """
    recipe, device = job.recipe, find_device()  # first: it keeps PyTorch's compiler from being loaded on a CPU
    import torch
    from transformers import set_seed

    config = generation_config(recipe, job.stop, job.pad)

    def answer_all(model: Any) -> list[Ids]:
        answers = []
        for ids in job.prompts:
            prompt = torch.tensor([ids], device=device.device)
            set_seed(recipe.seed)
            output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            answers.append(output[0, len(ids) :].tolist())
        return answers

    answers = {}
    with torch.inference_mode():
        for name, model in variants(job.base, {"adapter": job.adapter}, device, weight_bits(recipe), job.new_tokens):
            answers[name] = answer_all(model)
            progress(f"{len(answers[name])} answers by the {name}")
    return GenerateResult(**answers)
