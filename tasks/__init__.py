"""One module per stage of the pipeline: plain Python, no Airflow."""
