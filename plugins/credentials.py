"""The account of the Hugging Face Hub, from an Airflow connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from airflow.sdk import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.log import mask_secret

from include.storage.hub import CONNECTION


@contextmanager
def hub_account() -> Iterator[None]:
    """Set `HF_TOKEN` and `HF_ENDPOINT` from the connection `huggingface_default` while the context lasts.

    Without this connection the environment stays as it is. Stages and their subprocesses read the account from the
    environment only. The token is masked in Airflow's logs.
    """
    values: dict[str, str] = {}
    try:
        connection = Connection.get(CONNECTION)
        values = {"HF_TOKEN": (connection.password or "").strip(), "HF_ENDPOINT": _address(connection)}
    except AirflowNotFoundException:
        pass
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value})
    if token := os.environ.get("HF_TOKEN"):
        mask_secret(token)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _address(connection: Connection) -> str:
    host, port = connection.host or "", f":{connection.port}" if connection.port else ""
    return f"{host if not host or '://' in host else f'https://{host}'}{port if host else ''}"
