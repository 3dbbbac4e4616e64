"""
A stack that is up, opened for operating: its outputs, its containers, its backups, its pooler.

The one place where these are put together; commands ask here and pass them on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from memharbor.backup.engine import BackupEngine
from memharbor.containers import Containers
from memharbor.pooler import Pooler
from memharbor.stack import StackOutputs, find_leader
from memharbor.target import find_target


@dataclass(frozen=True)
class OpenStack:
    """What operating a stack needs."""

    outputs: StackOutputs
    containers: Containers
    engine: BackupEngine
    pooler: Pooler

    @property
    def pool_databases(self) -> list[str]:
        """PgBouncer's names for the database: read-write, read-only, session."""
        endpoints = self.outputs.endpoints
        return sorted({endpoint.dbname for endpoint in (endpoints.pool, endpoints.pool_ro, endpoints.pool_session)})


def open_stack(stack: str) -> OpenStack:
    """
    Open a stack for operating.

    Raises:
        ConfigError: The stack was never brought up, or MEMHARBOR_DSN says that another database is meant.
        ConnectError: No Docker engine answers.
    """
    outputs = find_target(stack, os.environ.get("MEMHARBOR_DSN")).stack_outputs("what works on the host")
    containers = Containers()
    engine = BackupEngine(containers, find_leader(outputs).container, outputs.stanza)
    return OpenStack(outputs, containers, engine, Pooler(containers, outputs.containers["pgbouncer"]))


def backup_engine(stack: str) -> BackupEngine:
    """Open only a stack's backups."""
    return open_stack(stack).engine
