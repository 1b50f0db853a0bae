# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes on one machine, without Docker: `python3 -m e2e.cluster --help`.

Standard library only, so that it runs with the system's Python before any virtual environment.
"""
