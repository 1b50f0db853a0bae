# SPDX-License-Identifier: Apache-2.0
# Included by the top-level Makefile.

.PHONY: image
image: ## Build the container image into build/image/weir.oci.tar
	python3 hack/image.py
