"""The training engine: everything that holds a model, in a subprocess that never imports Airflow.

Start a job of `include.engine.jobs` with `supervise.run`; `python -m include.engine` is the process that does it. Each
job has a process of its own, so that memory, signals and crashes stay apart from the task that waits for it.
"""
