"""The text on the page of a recipe's DAG."""

from __future__ import annotations

from include.data.sources import dataset_label
from include.recipe import Recipe, eval_ref
from include.recipe.model import template_name
from include.registry import registry_uri

_APPROVAL = {
    "always": "a person must approve each candidate that passes the gate",
    "on_regression": "a person must approve a candidate that passes the gate and regresses",
    "never": "none: only the gate decides",
}


def dag_doc(recipe: Recipe) -> str:
    """Return the Markdown that Airflow shows on the DAG's page: data, base, adapter, training, gate, schedule."""
    base = f"{4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 16}-bit base"
    trained = f"r={recipe.r}, alpha={recipe.lora_alpha}, {len(recipe.target_modules)} projections, {base}"
    if recipe.full_finetuning:
        trained = "none: the whole model is trained"
    length = f"{recipe.max_steps} steps" if recipe.max_steps > 0 else f"{recipe.num_train_epochs:g} epochs"
    evaluated = f"{recipe.holdout_share:.0%} held out"
    if found := eval_ref(recipe):
        evaluated = f"evaluated on `{dataset_label(found.name)}`" + (f" ({found.split})" if found.has_splits else "")
    template = template_name(recipe.chat_template)
    return f"""### {recipe.name}

{recipe.description}

| | |
|---|---|
| data | `{dataset_label(recipe.dataset)}`, {evaluated}, at most {recipe.max_refused_share:.0%} refused |
| base | `{recipe.base_model}`, template {template}, at most {recipe.max_seq_length:,} tokens |
| adapter | {trained} |
| training | {recipe.method}, {length} of {recipe.per_device_train_batch_size} x {recipe.gradient_accumulation_steps}, \
lr {recipe.learning_rate:g} |{_sweep(recipe)}
| gate | better than the base and than the live adapter; {len(recipe.prompts)} smoke-test prompts |
| approval | {_APPROVAL[recipe.approve]} |
| runs | {_times(recipe)} |
| registry | `{registry_uri(recipe.name, recipe.registry)}` |

Press **Trigger** to start a run. You can change values of the recipe there for that run only.
"""


def _sweep(recipe: Recipe) -> str:
    grid = " x ".join(f"{name} {values}" for name, values in recipe.sweep.items())
    return f"\n| sweep | {grid}: the best of {len(recipe.candidates())} candidates is published |" if grid else ""


def _times(recipe: Recipe) -> str:
    times = [f"at `{recipe.cron}` ({recipe.timezone}), skipped if nothing is new"] if recipe.cron else []
    times += [f"on each new revision of the dataset, checked every {recipe.watch_every:g} s"] if recipe.watch else []
    return "; ".join([*times, "when somebody presses **Trigger**"])
