#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build Weir's image with Docker, install it on a kind cluster and run the e2e suite there.
# KEEP=1 leaves the cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."

for tool in docker kind kubectl helm; do
	if ! command -v "$tool" >/dev/null; then
		echo "e2e/kind needs $tool in PATH; without Docker use: make cluster e2e" >&2
		exit 1
	fi
done

if kind get clusters 2>/dev/null | grep -qx weir; then
	echo "a kind cluster named weir is there: remove it with: kind delete cluster --name weir" >&2
	exit 1
fi

export KUBECONFIG=$PWD/build/kind/kubeconfig
mkdir -p "${KUBECONFIG%/*}"

finish() {
	if [[ ${KEEP:-} == 1 ]]; then
		echo "kept: export KUBECONFIG=$KUBECONFIG; remove it with: kind delete cluster --name weir"
	else
		kind delete cluster --name weir
	fi
}
trap finish EXIT

make image # with Docker, as it is there
image=$(<build/image/reference)
kind create cluster --config e2e/kind/cluster.yaml
kind load image-archive build/image/weir.oci.tar --name weir

# The kubelets know the API server by a name that only kind's own DNS resolves.
address=$(kubectl get nodes --selector node-role.kubernetes.io/control-plane \
	--output jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')
helm upgrade --install weir charts/weir --namespace kube-system --wait --timeout 5m \
	--set-string "image.repository=${image%:*}" --set-string "image.tag=${image##*:}" \
	--set-string "apiServer=https://${address%% *}:6443"
kubectl wait --for=condition=Ready nodes --all --timeout=120s
make e2e
