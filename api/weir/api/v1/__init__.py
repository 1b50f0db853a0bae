# SPDX-License-Identifier: Apache-2.0
"""The gRPC contract, version 1. weir_pb2*.py are generated from weir.proto by the build."""
