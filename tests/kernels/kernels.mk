# SPDX-License-Identifier: Apache-2.0
# The datapath on other kernels: KERNELS=6.1,6.12 (default) | all | any list of series.

KERNELS ?= 6.1,6.12
KERNEL_STEPS ?= load,bpf,node,sctp

.PHONY: test-kernels
test-kernels: setup ## load, bpf ring, node core, SCTP sockets on other kernels (KERNELS=6.1,6.12|all)
	@hack/require_root.sh "kernels are booted with this machine's files"
	@# Debian 12's QEMU brings virtiofsd; elsewhere it is a package of its own.
	@test -x /usr/lib/qemu/virtiofsd -o -x /usr/libexec/virtiofsd || \
		apt-get -qq install -y virtiofsd >/dev/null
	@PYTHONPATH=tests $(PYTHON) -m kernels $(KERNELS) --steps $(KERNEL_STEPS)
