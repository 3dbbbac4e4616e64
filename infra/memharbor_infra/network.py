"""
The network of a stack.
"""

from __future__ import annotations

import pulumi
import pulumi_docker as docker

from memharbor_infra.labels import labels


class Network(pulumi.ComponentResource):
    """One bridge network, named like the stack; services find each other on it by their names."""

    network_name: pulumi.Output[str]

    def __init__(self, name: str, stack: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("memharbor:infra:Network", name, None, opts)
        network = docker.Network(
            "network-bridge",
            name=stack,
            driver="bridge",
            labels=[docker.NetworkLabelArgs(label=key, value=value) for key, value in labels(stack, "network").items()],
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.network_name = network.name
        self.register_outputs({"network_name": self.network_name})
