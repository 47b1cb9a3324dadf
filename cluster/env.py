"""`make compose-env`: write new random secrets of the cluster to a file that only its owner can read.

This module imports the standard library only, so that a machine with containers needs no virtual environment.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
from pathlib import Path

SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET", "API_SECRET", "JWT_SECRET", "ADMIN_PASSWORD")


def fernet_key() -> str:
    """Return a new key for values that Airflow encrypts in its database: 32 random bytes (Fernet specification)."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def write_env(path: Path, **values: str) -> None:
    """Write every variable of docker-compose.yaml that has no default, and the given values.

    Raises:
        FileExistsError: the file exists; new secrets would lock its owner out of the database.
    """
    values |= {name: secrets.token_urlsafe(32) for name in SECRETS}
    values["FERNET_KEY"] = fernet_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / ".env"
    try:
        write_env(target, COMPOSE_PROFILES="gpu")
    except FileExistsError:
        sys.exit(f"{target} exists already. docs/operations.md says how to change a secret in it.")
    print(f"{target} has new secrets. Next: docker compose up -d   (without a GPU: docker compose --profile")
    print("cpu-train up -d), then http://127.0.0.1:8080, user admin, the password is ADMIN_PASSWORD in that file.")
