"""
What a stack tells the command line: `memharbor.stack.StackOutputs`, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pulumi

from memharbor.server_files.pgbouncer import pool_names
from memharbor.server_files.postgres import (
    POSTGRES_PORT,
    STANZA,
    STORE_BUCKET,
    STORE_PORT,
    STORE_REGION,
    repository_path,
)
from memharbor_infra.config import Configuration
from memharbor_infra.database import Node

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


def client_host(bind_address: str) -> str:
    """
    Name the address under which this host's own clients reach a published port.

    >>> client_host("0.0.0.0"), client_host("127.0.0.1")
    ('127.0.0.1', '127.0.0.1')
    """
    return _WILDCARDS.get(bind_address, bind_address)


def describe_endpoints(configuration: Configuration) -> dict[str, dict[str, str | int]]:
    """List the ways in, for clients outside of Docker; in `single` the one node serves reads as well."""
    settings = configuration.settings
    host, names = client_host(settings.bind_address), pool_names(settings.database)
    direct: dict[str, str | int] = {"host": host, "port": settings.postgres_port, "dbname": settings.database}
    pooled: dict[str, str | int] = {"host": host, "port": settings.pool_port}
    return {
        "rw": direct,
        "ro": direct,
        "pool": {**pooled, "dbname": names["read_write"]},
        "pool_ro": {**pooled, "dbname": names["read_only"]},
        "pool_session": {**pooled, "dbname": names["session"]},
    }


def describe_node(stack: str, node: Node, volume: Any, files_volume: Any) -> dict[str, Any]:
    """Describe one database node."""
    return {
        "index": node.index,
        "name": node.name,
        "host": f"{stack}-{node.name}",
        "container": f"{stack}-{node.name}",
        "volume": volume,
        "files_volume": files_volume,
        "address": f"{node.name}:{POSTGRES_PORT}",
        "roles": list(node.roles),
    }


def export_outputs(
    configuration: Configuration,
    *,
    nodes: Sequence[Mapping[str, Any]],
    containers: Mapping[str, Sequence[Any]],
    images: Mapping[str, Any],
    network: Any,
    store_volume: Any,
) -> None:
    """
    Export the outputs of a stack; the arguments are what only the resources know.
    """
    stack, settings, secrets = configuration.stack, configuration.settings, configuration.secrets
    outputs: dict[str, Any] = {
        "stack": stack,
        "topology": settings.topology,
        "stanza": STANZA,
        "database": settings.database,
        "settings": settings.model_dump(),
        "nodes": list(nodes),
        "endpoints": describe_endpoints(configuration),
        "containers": {service: list(names) for service, names in containers.items()},
        "store": {
            "bucket": STORE_BUCKET,
            "repository_path": repository_path(stack),
            "endpoint": f"backup-store:{STORE_PORT}",
            "region": STORE_REGION,
            "volume": store_volume,
        },
        "images": dict(images),
        "network": network,
        "ca_certificate": secrets.authority.certificate,
        "passwords": pulumi.Output.secret(dict(secrets.passwords)),
    }
    for name, value in outputs.items():
        pulumi.export(name, value)
