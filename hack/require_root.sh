#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# require_root.sh REASON: end with a clear message unless root.
set -euo pipefail

if ((EUID != 0)); then
	echo "run as root: $1" >&2
	exit 1
fi
