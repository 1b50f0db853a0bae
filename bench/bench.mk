# SPDX-License-Identifier: Apache-2.0
# Benchmarks against the peers: ONLY=name[,name] runs some (make bench ONLY=help lists them).

ONLY ?=

.PHONY: bench
bench: setup ## benchmarks side by side with the peers; ONLY=name runs one; writes build/bench.json
	@hack/require_root.sh "benchmarks make network namespaces and load programs"
	@PYTHONPATH=$(CURDIR) $(PYTHON) -m bench $(ONLY)
