# SPDX-License-Identifier: Apache-2.0
# The local Kubernetes. Variables: NODES ROUTING IPFAMILY CNI KUBE_PROXY NETPOL KUBE_BIN (see
# e2e/cluster/).

# Standard library only: cluster-down works where the virtual environment is gone or was never made.
CLUSTER = PYTHONPATH=$(CURDIR) $(firstword $(wildcard $(PYTHON)) python3) -m e2e.cluster

##@ Cluster

.PHONY: cluster
cluster: setup ## a real Kubernetes with Weir: NODES=2 ROUTING=vxlan IPFAMILY=dual CNI=weir KUBE_PROXY=none NETPOL=none
	@$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## remove every trace of the cluster, whatever state it is in
	@$(CLUSTER) down

.PHONY: cluster-check-clean
cluster-check-clean: ## list what is left of a cluster on this machine; fails if anything is
	@$(CLUSTER) check-clean

.PHONY: cluster-status
cluster-status: ## PIDs of the nodes and of their components
	@$(CLUSTER) status

.PHONY: deploy
deploy: setup ## build a changed Weir and roll it out on the cluster that is up
	@$(CLUSTER) deploy

.PHONY: conformance
conformance: ## Kubernetes' own suite on the cluster that is up or KUBECONFIG: LIST=conformance|others|dual-stack|load-balancer or FOCUS= SKIP=; PROCS=4
	@PYTHONPATH=$(CURDIR) $(firstword $(wildcard $(PYTHON)) python3) -m e2e.conformance

.PHONY: conformance-policy
conformance-policy: ## upstream's ClusterNetworkPolicy suite on the cluster that is up or KUBECONFIG: PROFILE=all|standard FOCUS= SCTP=0|1
	@PYTHONPATH=$(CURDIR) $(firstword $(wildcard $(PYTHON)) python3) -m e2e.conformance.policy

.PHONY: kind-e2e
kind-e2e: setup ## with Docker: build, make a kind cluster, install, run the e2e suite; KEEP=1 keeps it
	@e2e/kind/run.sh
