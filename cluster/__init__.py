"""Beyond one machine: images, secrets, and docker-compose.yaml as processes of this machine."""
