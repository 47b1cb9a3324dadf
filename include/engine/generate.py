"""The generate job: answers to prompts, by what was trained and by the bare base, in a process that trained neither."""

from __future__ import annotations

from copy import copy
from typing import Any

from include.engine.arguments import generation_config
from include.engine.device_plan import find_device
from include.engine.jobs import GenerateJob, GenerateResult, Ids, Progress
from include.engine.model import variants, weight_bits
from include.recipe import AnyRecipe

BATCH_TOKENS = 16_384  # of prompts and answers with padding: the keys and values of a 3B model then take 2 GB
PROBE = 4  # tokens of the answers that are compared
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # of logits, relative to the largest one


def generate(job: GenerateJob, progress: Progress) -> GenerateResult:
    """Answer each prompt with the adapter (or the whole model that was trained) and with the base.

    An answer does not depend on the other prompts. With sampling the seed is set anew for each prompt. Greedy answers
    are computed together where a test shows that padding does not change them; in 16 bits a batch rounds otherwise than
    a prompt alone, so that two tokens that are almost equally likely may change places.

    Raises:
        NotFound: the base or the adapter cannot be loaded.
    """
    recipe, device = job.recipe, find_device()  # first: it keeps PyTorch's compiler from being loaded on a CPU
    import torch
    from transformers import set_seed

    config = generation_config(recipe, job.stop, job.pad)

    def one_by_one(model: Any) -> list[Ids]:
        answers: list[Ids] = []
        for ids in job.prompts:
            set_seed(recipe.seed)
            answers += _answers(model, [ids], config)
        return answers

    answers, together = dict[str, list[Ids]](), _may_batch(recipe)
    with torch.inference_mode():
        for name, model in variants(job.base, {"adapter": job.adapter}, device, weight_bits(recipe), job.new_tokens):
            if together and not answers:  # it is the same with an adapter
                together = padding_changes_nothing(model, job.prompts, config)
            answers[name] = _batched(model, job, config, progress) if together else one_by_one(model)
            progress(f"{len(answers[name])} answers by the {name}{'' if together else ', one by one'}")
    return GenerateResult(**answers)


def _may_batch(recipe: AnyRecipe) -> bool:
    """Return whether a prompt's answer has no part in another one's: no random numbers drawn in turn, no rule that
    counts the padding as text, nothing unknown."""
    plain = recipe.num_beams == 1 and recipe.repetition_penalty == 1 and not recipe.no_repeat_ngram_size
    return plain and not recipe.do_sample and not recipe.generation_arguments


def padding_changes_nothing(model: Any, prompts: list[Ids], config: Any) -> bool:
    """Return whether the shortest prompt is answered the same alone and padded to the longest one's length.

    Layers that ignore the attention mask, or positions that count the padding, change its logits.

    Args:
        prompts: token ids of each.
        config: transformers' GenerationConfig, greedy.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if len(shortest) == len(longest):
        return True
    config = copy(config)
    config.update(max_new_tokens=PROBE, min_new_tokens=PROBE, output_logits=True, return_dict_in_generate=True)
    alone, padded = (_answers(model, batch, config).logits for batch in ([shortest], [shortest, longest]))
    tolerance = TOLERANCES[str(model.dtype).removeprefix("torch.")]
    for one, other in zip(alone, padded, strict=True):
        if (one[0] - other[0]).abs().max() > tolerance * one[0].abs().max():
            return False
        if one[0].argmax() != other[0].argmax():  # within the tolerance: the next logits are another text's
            break
    return True


def _batched(model: Any, job: GenerateJob, config: Any, progress: Progress) -> list[Ids]:
    """Return the answers, computed in batches of similar lengths; halve the batches when memory runs out."""
    import torch

    batch_tokens, answers = BATCH_TOKENS, dict[int, Ids]()
    order = sorted(range(len(job.prompts)), key=lambda i: len(job.prompts[i]), reverse=True)  # the largest batch first
    while order:
        most = len(job.prompts[order[0]]) + config.max_new_tokens
        batch = order[: max(1, batch_tokens // most)]
        try:
            found = _answers(model, [job.prompts[i] for i in batch], config)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_tokens = len(batch) * most // 2
            progress(f"out of memory: answering in batches of {batch_tokens:,} tokens")
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        for i, ids in zip(batch, found, strict=True):
            end = next((place + 1 for place, id in enumerate(ids) if id in job.stop), len(ids))
            answers[i] = ids[:end]
        order = order[len(batch) :]
    return [answers[i] for i in range(len(answers))]


def _answers(model: Any, prompts: list[Ids], config: Any) -> Any:
    """Return what the model generates after prompts, padded on the left: ids of each, or what `config` asks for."""
    import torch

    longest, pad = max(map(len, prompts)), config.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output if config.return_dict_in_generate else output[:, longest:].tolist()
