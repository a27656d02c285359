# Every target prepares what it needs, in .venv, from the pinned lists. Needs Python 3.11+ and make, nothing else.
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# The machine's own trust store: what pip and the browser trust, uv trusts, behind a company's proxy too.
export UV_SYSTEM_CERTS ?= 1

.PHONY: demo test lint bench chaos hosts-test k8s-check k8s-test docs lock clean help
.DEFAULT_GOAL := help

help: ## show the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

demo: $(VENV)/run.stamp ## fit an epidemic to real data: 20 parameter sets x 200 replicates
	$(BIN)/modelops run bundles/boarding_school_flu

test: $(VENV)/dev.stamp ## run all tests
	$(AGAIN) $(BIN)/python -m pytest -n 2 --dist loadfile

N ?= 100000
simulate: $(VENV)/dev.stamp ## drive N=100000 random schedules of faults through the driver's machine
	$(BIN)/python tests/unit/simulate.py $(N)

lint: $(VENV)/dev.stamp ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/dev.stamp ## kill and stop what runs jobs, for half an hour or so; JOBS=20 is what CI does
	$(BIN)/python tests/chaos/soak.py --jobs $(or $(JOBS),100)

k8s-check: $(UV) ## render the overlays and let checkov look at them; needs kubectl
	@test -x $(VENV)/k8s/bin/checkov || { $(UV) venv --quiet $(VENV)/k8s && \
		$(UV) pip install --quiet --python $(VENV)/k8s/bin/python 'checkov==3.3.30'; }
	@for o in k8s/overlays/* tests/kubernetes/overlay; do echo "== $$o"; kubectl kustomize $$o > $(VENV)/k8s/rendered.yaml && \
		$(VENV)/k8s/bin/checkov --skip-download --quiet --compact --framework kubernetes -f $(VENV)/k8s/rendered.yaml \
		|| exit 1; done

K8S_TESTS = $(BIN)/python -m pytest tests/kubernetes tests/acceptance/test_manifests.py \
	--timeout 1800 -o faulthandler_timeout=0 --durations=0 --durations-min=5
k8s-test: $(VENV)/dev.stamp ## deploy to the cluster of KUBECONFIG, or to one made here (root, Debian), and let pods go while jobs run
	$(if $(KUBECONFIG),,tests/kubernetes/lab/run.sh) $(AGAIN) $(K8S_TESTS)

hosts-test: $(VENV)/dev.stamp ## a pool on many hosts, far apart and cut off from one another; needs root, says so if it cannot
	$(AGAIN) $(BIN)/python -m pytest tests/hosts -s -rs --timeout 600

bench: $(VENV)/dev.stamp $(VENV)/peers.stamp ## measure, half an hour; nothing here passes or fails
	@for b in bench/*.py; do echo "== $$b"; case $$b in */peers.py) p=$(VENV)/peers/bin/python;; *) p=$(BIN)/python;; esac; \
		$$p $$b || exit 1; done

docs: $(VENV)/dev.stamp ## redraw what is made from the code, and run the examples of the pages
	$(BIN)/python docs/draw_states.py
	$(BIN)/python -m pytest tests/acceptance/test_docs.py

lock: $(VENV)/dev.stamp ## resolve the pinned lists anew
	$(UV) lock --upgrade --quiet
	$(UV) export --quiet --no-emit-project --no-annotate --no-header --no-dev --extra sampling --extra postgres -o requirements.txt >/dev/null
	$(UV) export --quiet --no-emit-project --no-annotate --no-header --all-groups --extra sampling --extra postgres -o requirements-dev.txt >/dev/null

clean: ## remove the environment and caches of this checkout
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(UV):
	@test -n "$(PYTHON)" || { echo "ModelOps needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14'

$(VENV)/run.stamp: $(UV) requirements.txt pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -r requirements.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

PEERS = loky==3.7.0 ray==2.60.0 parsl==2026.10.26
$(VENV)/peers.stamp: $(VENV)/run.stamp Makefile
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)/peers
	$(UV) pip install --quiet --python $(VENV)/peers/bin/python -r requirements.txt $(PEERS)
	$(UV) pip install --quiet --python $(VENV)/peers/bin/python --no-deps --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(UV) pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	@touch $@
