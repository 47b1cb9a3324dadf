"""The command line, `python -m retune`: its commands, Airflow as a process of this machine, the generated documents."""
