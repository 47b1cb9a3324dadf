"""The training engine: everything that holds a model, in subprocesses that never import Airflow."""
