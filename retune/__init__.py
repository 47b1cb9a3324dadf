"""The command line, `python -m retune`: its commands, Airflow as a process of this machine, the generated docs.

Nothing imports this package but the tests. It may import everything but `dags` and `plugins`, and never Airflow itself.
"""
