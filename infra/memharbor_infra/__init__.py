"""Memharbor's containers, networks, volumes and files, as a Pulumi program."""
