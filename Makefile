# Everything runs from here; `make` alone lists the targets. State goes under var/, packages under .venv/.
PYTHON ?= python3
PORT ?= 8080
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo run rollback up compose-env cluster test-fast test test-cluster lint bench-data bench-shards bench-train clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with the pinned packages

$(READY): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2]) if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0'
	@echo "installing the packages of requirements.txt into .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(READY) ## the whole pipeline on this machine: a small model is trained, tested and published
	@.venv/bin/python -m retune run demo

run: $(READY) ## run a recipe without UI: make run RECIPE=name-or-path [SET="max_steps=20 r=8"]
	@test -n "$(RECIPE)" || { echo 'which one? make run RECIPE=<name or path>'; exit 2; }
	@.venv/bin/python -m retune run $(RECIPE) $(foreach pair,$(SET),--set '$(pair)')

rollback: $(READY) ## make a published version live again: make rollback RECIPE=name VERSION=v1 REASON="..."
	@test -n "$(RECIPE)" -a -n "$(VERSION)" || { echo 'which one? make rollback RECIPE=<name> VERSION=<v1> REASON="..."'; exit 2; }
	@.venv/bin/python -m retune rollback $(RECIPE) $(VERSION) --reason "$(REASON)"

up: $(READY) ## Airflow with its UI on http://127.0.0.1:8080 (PORT=...); Ctrl-C stops it
	@exec .venv/bin/python -m retune up --port $(PORT)

compose-env: ## .env with fresh secrets, for docker compose
	@$(PYTHON) cluster/env.py

cluster: $(READY) ## docker-compose.yaml on this machine without containers (PORT=...); Ctrl-C stops it
	@exec .venv/bin/python -m cluster --port $(PORT)

test-fast: $(READY) ## the tests that start no training process and no Airflow (two minutes)
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not engine and not airflow and not cluster"

test: $(READY) ## all tests except those of the cluster
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not cluster"

test-cluster: $(READY) ## the tests of the cluster: needs the programs of Postgres and Redis
	@.venv/bin/python -m pytest -m cluster

lint: $(READY) ## style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench-data: $(READY) ## time the data leg against its floor and the notebook's way (ROWS="10000 100000")
	@.venv/bin/python -m bench.data $(if $(ROWS),--rows $(ROWS))

bench-shards: $(READY) ## time one worker against two on shards of the data (ROWS=200000)
	@.venv/bin/python -m bench.shards $(if $(ROWS),--rows $(ROWS))

bench-train: $(READY) ## time ways to train on the device at hand
	@.venv/bin/python -m bench.train

clean: ## remove what runs have left (var/), keep .venv
	rm -rf var
