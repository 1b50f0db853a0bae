#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_packages.sh LIST: install the Debian or Ubuntu packages that LIST names and that are missing.
set -euo pipefail

list=$1
if ! command -v apt-get >/dev/null; then
	echo "this machine has no apt-get: install by hand what $list names (Debian 12, Ubuntu 24.04)" >&2
	exit 1
fi
mapfile -t wanted < <(sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$list")
missing=()
for package in "${wanted[@]}"; do
	status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
	[[ $status == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
	exit 0
fi
if ((EUID != 0)); then
	echo "missing packages: ${missing[*]}" >&2
	echo "run as root, or: sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "installing ${#missing[@]} packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
