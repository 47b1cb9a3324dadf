"""pretrain: makes the demo's own base model, once; recipes that name a real base have no such task."""

from __future__ import annotations

from include.stage import Job, Result, stage


@stage(version=1, uses=("base_model", "base_revision"), named_by=lambda job: str(job.recipe.base_revision))
def pretrain(job: Job) -> Result:
    """Pretrain the little Llama of `include/world.py` and keep it in the store under its revision."""
    from include.world import pretrain as train_little_llama

    facts = train_little_llama(job.out, job.say)
    line = f"{facts['parameters'] / 1e6:.1f} M parameters, loss {facts['first_loss']:.2f} -> {facts['last_loss']:.2f}"
    return Result(line, facts)
