"""
The stack, put together: images, network, volumes, backup store, database, pooler, custodian.

Everything that can be wrong in the config is found before the first resource is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pulumi

from memharbor.errors import ConfigError
from memharbor.stack.config import OFFSITE_KEYS
from memharbor.stack.secrets import node_names
from memharbor_infra import backup_store, custodian, database, pooler
from memharbor_infra.backup_store import BackupStore
from memharbor_infra.config import Configuration, read_configuration
from memharbor_infra.contexts import BuildContext, build_contexts
from memharbor_infra.custodian import Custodian
from memharbor_infra.database import Database, plan_nodes
from memharbor_infra.images import Images
from memharbor_infra.network import Network
from memharbor_infra.outputs import describe_node, export_outputs
from memharbor_infra.pooler import Pooler
from memharbor_infra.volumes import DataVolumes


def deploy(stack: str, config: Mapping[str, str], conflicts: Sequence[str] = ()) -> None:
    """
    Register all resources of a stack and export its outputs.

    Args:
        stack: The stack's name.
        config: Its whole config, by full key.
        conflicts: What of it does not go with what is already there, see `memharbor.stack.conflicts`.

    Raises:
        ConfigError: The config is wrong; nothing was registered.
    """
    configuration = read_configuration(stack, config, conflicts)
    _refuse_secrets_in_clear(stack, config)
    compose(configuration, build_contexts(configuration.settings.base_image))


def _refuse_secrets_in_clear(stack: str, config: Mapping[str, str]) -> None:
    for key in OFFSITE_KEYS:
        if key in config and not pulumi.runtime.is_config_secret(key):
            name = key.partition(":")[2]
            raise ConfigError(
                f"{name} stands in the stack's config in clear",
                hint=f"run `pulumi config set --secret {name} --stack {stack}`, and replace the key: it was on disk",
            )


def compose(configuration: Configuration, contexts: Mapping[str, BuildContext]) -> None:
    """Register all resources of a valid configuration and export its outputs."""
    stack = configuration.stack
    nodes = plan_nodes(configuration.settings)
    (store_name,), (custodian_name,) = node_names(backup_store.SERVICE), node_names(custodian.SERVICE)

    images = Images("images", contexts, base_image=configuration.settings.base_image)
    network = Network("network", stack)
    volumes = DataVolumes(
        "volumes", stack, {**{node.name: database.SERVICE for node in nodes}, store_name: backup_store.SERVICE}
    )
    store = BackupStore(
        "backup-store",
        configuration,
        container=store_name,
        volume=volumes.names[store_name],
        image=images.ids["backup-store"],
        carrier_image=images.base_id,
        network=network.network_name,
    )
    servers = Database(
        "database",
        configuration,
        nodes=nodes,
        volumes=volumes.names,
        image=images.ids["postgres"],
        carrier_image=images.base_id,
        network=network.network_name,
        store=store,
    )
    poolers = Pooler(
        "pooler",
        configuration,
        containers=node_names(pooler.SERVICE),
        image=images.ids["pgbouncer"],
        carrier_image=images.base_id,
        network=network.network_name,
    )
    keeper = Custodian(
        "custodian",
        configuration,
        container=custodian_name,
        image=images.ids["custodian"],
        carrier_image=images.base_id,
        network=network.network_name,
        store=store,
    )
    export_outputs(
        configuration,
        nodes=[
            describe_node(stack, node, volumes.names[node.name], servers.files_volumes[node.name]) for node in nodes
        ],
        containers={
            "pgbouncer": poolers.container_names,
            "backup_store": [store.container_name],
            "custodian": [keeper.container_name],
        },
        images=images.ids,
        network=network.network_name,
        store_volume=volumes.names[store_name],
    )
