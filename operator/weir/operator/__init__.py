# SPDX-License-Identifier: Apache-2.0
"""The cluster side: watches the API server, compiles, distributes to agents, writes back."""
