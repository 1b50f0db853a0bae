# SPDX-License-Identifier: Apache-2.0
# Benchmarks against the peers: ONLY=name[,name] runs some (make bench ONLY=help lists them).
# SERVICES=10,10000 are the numbers of Services at which ClusterIPs are measured, POLICIES=10,1000
# those of policies for policy_connect, NAMESPACES=300 of a hundred policies and pods each for
# policy_change.

ONLY ?=
SERVICES ?= 10,10000

.PHONY: bench
bench: setup ## benchmarks side by side with the peers; ONLY=name runs one; writes build/bench.json
	@hack/require_root.sh "benchmarks make network namespaces and load programs"
	@SERVICES=$(SERVICES) PYTHONPATH=$(CURDIR) $(PYTHON) -m bench $(ONLY)
