# SPDX-License-Identifier: Apache-2.0
"""Run Kubernetes' own e2e suite against a cluster: `make conformance` with FOCUS, SKIP, PROCS."""
