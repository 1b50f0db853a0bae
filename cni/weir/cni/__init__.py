# SPDX-License-Identifier: Apache-2.0
"""What the container runtime asks for: ADD, DEL, CHECK, GC, STATUS, and what they need."""
