"""The training engine: everything that holds a model, in a subprocess that never imports Airflow.

`supervise.run` is the way in; `python -m include.engine` is the other end. One job is one process, so that memory,
signals and crashes stay apart from the task that waits for it.
"""
