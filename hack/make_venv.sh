#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# make_venv.sh DIR: a virtual environment with Weir installed in place and its development tools.
set -euo pipefail

venv=$1
python=
for candidate in python3 python3.13 python3.12 python3.11; do
	if command -v "$candidate" >/dev/null &&
		"$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		python=$candidate
		break
	fi
done
if [[ -z $python ]]; then
	echo "no Python 3.11 or newer with venv: install python3 and python3-venv" >&2
	exit 1
fi
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
echo "installing Weir and its tools into $venv"
"$venv/bin/pip" --quiet --disable-pip-version-check install --upgrade pip
"$venv/bin/pip" --quiet --disable-pip-version-check install --editable '.[dev]'
