# SPDX-License-Identifier: Apache-2.0
# The only entry points of the project; CI calls the same targets. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# operator/ and friends must never shadow the standard library's modules.
export PYTHONSAFEPATH := 1

VENV := .venv
PYTHON := $(VENV)/bin/python
RINGS ?= unit bpf node
PYTEST_ARGS ?=

include e2e/cluster/cluster.mk
include hack/image.mk
include tests/kernels/kernels.mk
include bench/bench.mk

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | \
		awk -F ':.*## ' '{ printf "  make %-18s %s\n", $$1, $$2 }'

##@ Set-up

.PHONY: setup
setup: build/.packages build/.venv ## install system packages and the virtual environment
	@$(PYTHON) hatch_build.py
	@$(MAKE) --no-print-directory shim

build/.packages: hack/packages.txt hack/install_packages.sh
	@hack/install_packages.sh hack/packages.txt
	@mkdir -p $(@D) && touch $@

build/.venv: pyproject.toml hatch_build.py | build/.packages
	@hack/make_venv.sh $(VENV)
	@mkdir -p $(@D) && touch $@

.PHONY: build
build: setup ## compile BPF objects, the libbpf binding, protobuf modules and the shim

.PHONY: shim
shim: ## compile the static CNI shim to build/shim/weir
	@$(MAKE) --no-print-directory -C cni/shim

.PHONY: tools
tools: setup ## build the programs of others that tests run: helm, cnitool
	@$(CLUSTER) build helm cnitool

##@ Checks

.PHONY: lint
lint: setup ## ruff, mypy, layers, chart, shell scripts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy api operator datapath cni agent cli tests/support bench hack hatch_build.py
	$(VENV)/bin/mypy -p e2e
	$(VENV)/bin/lint-imports
	$(PYTHON) hack/chart_readme.py --check
	git ls-files '*.sh' .ci/run | xargs -r shellcheck

.PHONY: test
test: tools ## every ring that needs no cluster: unit, bpf, node
	@hack/require_root.sh "the bpf and node rings load programs and make namespaces"
	$(VENV)/bin/pytest $(addprefix tests/,$(RINGS)) $(PYTEST_ARGS)

.PHONY: unit
unit: tools ## the ring that needs no root
	$(VENV)/bin/pytest tests/unit $(PYTEST_ARGS)

.PHONY: e2e
e2e: setup ## the cluster suite, on the cluster that is up or the one KUBECONFIG names
	$(VENV)/bin/pytest e2e/suite $(PYTEST_ARGS)

.PHONY: clean
clean: ## remove what the build made in the checkout (never a running cluster)
	@if [ -e build/cluster/run ]; then echo "a cluster is up: run 'make cluster-down' first" >&2; exit 1; fi
	rm -rf build dist datapath/weir/datapath/objects datapath/weir/datapath/_libbpf*.so
	rm -f api/weir/api/v1/weir_pb2*
