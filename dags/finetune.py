"""One DAG per recipe: from a ShareGPT dataset to a published adapter.

Everything that a stage does is in `tasks/`; this file is the picture of the pipeline and Airflow's part in it: queues,
the one-slot pool of the GPU, the trigger form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, task

from dags.common import RETRIES, hub_account
from include.errors import RetuneError
from include.recipe import Recipe, form, load
from include.settings import recipe_files
from include.sources import DEMO_BASE
from include.stage import Stage
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.pretrain import pretrain
from tasks.publish import publish
from tasks.report import report
from tasks.resolve import resolve
from tasks.smoke_test import smoke_test
from tasks.standardize import standardize
from tasks.template import template
from tasks.train import train
from tasks.validate import validate
from tasks.verify import verify

GPU = {"queue": "gpu", "pool": "gpu"}  # the pool has one slot: two trainings never share a device


def finetune(recipe: Recipe) -> DAG:
    """The DAG of one recipe."""
    with DAG(
        recipe.name,
        description=recipe.description,
        doc_md=_doc(recipe),
        params={name: Param(field["value"], section=field["section"], **field["schema"])
                for name, field in form(recipe).items()},
        schedule=None,
        catchup=False,
        max_active_runs=1,
        tags=["retune", recipe.base_model.rsplit("/", 1)[-1]],
        default_args=RETRIES,
    ) as dag:  # fmt: skip
        frozen = _resolve(recipe.name)
        raw = on(download)(frozen)
        good = on(validate)(raw)
        messages = on(standardize)(good)
        tokens = on(template)(messages)
        adapter = on(train, **GPU)(tokens)
        answers = on(smoke_test, **GPU)(adapter)
        verdict = on(evaluate, **GPU)(answers)
        version = on(publish)(verdict)
        proof = on(verify)(version)
        if recipe.base_model == DEMO_BASE:
            frozen >> on(pretrain)(frozen) >> good  # the first that may look at the base: at its chat template
        proof >> _report(recipe.name).as_teardown()  # a teardown runs after a failure, too, and does not hide it
    return dag


def on(stage: Stage, **where: Any) -> Callable[..., Any]:
    """A stage as a task."""

    @task(task_id=stage.name, doc_md=stage.__doc__, **where)
    def run(trail: Any):  # no return annotation: Airflow would push each key of the trail as a value of its own
        with hub_account():
            return stage(trail)

    return run


@task(task_id="resolve", doc_md=resolve.__doc__)
def _resolve(name: str, params: Any = None, run_id: Any = None):
    with hub_account():
        return resolve(name, dict(params), run_id)


@task(task_id="report", doc_md=report.__doc__, retries=1)
def _report(name: str, run_id: Any = None) -> str:
    return report(name, run_id)


def _doc(recipe: Recipe) -> str:
    base = f"{4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 16}-bit base"
    trained = f"r={recipe.r}, alpha={recipe.lora_alpha}, {len(recipe.target_modules)} projections, {base}"
    if recipe.full_finetuning:
        trained = "none: the whole model is trained"
    length = f"{recipe.max_steps} steps" if recipe.max_steps > 0 else f"{recipe.num_train_epochs:g} epochs"
    return f"""### {recipe.name}

{recipe.description}

| | |
|---|---|
| data | `{recipe.dataset}`, {recipe.holdout_share:.0%} held out, at most {recipe.max_refused_share:.0%} refused |
| base | `{recipe.base_model}`, template {recipe.chat_template}, at most {recipe.max_seq_length:,} tokens |
| adapter | {trained} |
| training | {recipe.method}, {length} of {recipe.per_device_train_batch_size} x {recipe.gradient_accumulation_steps}, \
lr {recipe.learning_rate:g} |
| gate | better than the base and than what is live; {len(recipe.prompts)} smoke-test prompts |
| registry | `{recipe.registry or "a folder under var/"}` |

Press **Trigger** to run it, with other values if you like. A value given there holds for that run only.
"""


def _broken(file: Path, error: RetuneError) -> DAG:
    """Stands where the DAG of an unreadable recipe would stand, and says why; the other recipes go on."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in file.stem)
    with DAG(name, description=str(error), doc_md=f"**This recipe cannot be read.** {error}", tags=["broken"]) as dag:

        @task(task_id="resolve", retries=0)
        def fail() -> None:
            load(file)

        fail()
    return dag


for _file in recipe_files():
    try:
        _dag = finetune(load(_file))
    except RetuneError as _error:
        _dag = _broken(_file, _error)
    globals()[f"dag_{_dag.dag_id}"] = _dag
