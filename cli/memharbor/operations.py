"""
A stack that is up, opened for operating: its outputs, its containers, its backups, its pooler.

The one place where these are put together; commands ask here and pass them on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memharbor.backup.access import present_tables
from memharbor.backup.certificate import Signer
from memharbor.backup.checkpoint import KEYS, Checkpoint, Checkpoints, Scope
from memharbor.backup.custodian import Custodian
from memharbor.backup.engine import BackupEngine
from memharbor.backup.plan import plan_restore
from memharbor.backup.records import Records
from memharbor.backup.rollback import RollbackPlan, Way, plan_rollback
from memharbor.containers import Containers
from memharbor.database import Connection
from memharbor.errors import ConfigError, ConnectError
from memharbor.pooler import Pooler
from memharbor.stack import StackOutputs, find_leader, provisioner
from memharbor.stack.certificates import create_leaf
from memharbor.stack.config import SECRETS_KEY
from memharbor.stack.outputs import ca_certificate_path
from memharbor.stack.secrets import parse_secrets
from memharbor.target import Target, find_target, folder_name, identify_database

if TYPE_CHECKING:
    from memharbor.backup.erase_user import Place


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


def open_custodian(stack: str) -> Custodian:
    """
    Open a stack's custodian.

    Raises:
        StateRefusedError: The stack has none yet.
    """
    opened = open_stack(stack)
    return Custodian(opened.containers, opened.outputs.containers, opened.engine)


@dataclass(frozen=True)
class CheckpointPlace:
    """The checkpoints of a database, and what going back to them needs; `opened` is its stack, where there is one."""

    target: Target
    opened: OpenStack | None
    checkpoints: Checkpoints

    def connect(self) -> Connection:
        """Connect to the database as its administrator, committing by statement."""
        return self.target.connect("admin", autocommit=True)

    def resolve(self, scope: Scope) -> tuple[str, ...]:
        """List the tables that a scope means here."""
        with closing(self.connect()) as connection:
            return scope.resolve(present_tables(connection, list(KEYS)))

    def ways(self, checkpoints: Sequence[Checkpoint]) -> dict[str, list[str]]:
        """List the ways that may lead back to each checkpoint, without looking at what was changed since."""
        backups = self.opened.engine.list_backups() if self.opened is not None and checkpoints else []
        found = {}
        for each in checkpoints:
            found[each.name] = ["copies"] if each.copies else []
            if each.point is not None and any(not b.has_error and b.stop_lsn <= each.lsn for b in backups):
                found[each.name].append("restore" if each.is_everything else "restored-copy")
        return found

    def plan(self, name: str, wanted: Way | None) -> RollbackPlan:
        """
        Choose how to roll back to a checkpoint, also while the database does not answer.

        Raises:
            StateRefusedError: There is no such checkpoint, or no way back that is exact.
        """
        checkpoint = self.checkpoints.get(name)
        find_restore = None
        if self.opened is not None:
            engine, point = self.opened.engine, checkpoint.point
            find_restore = partial(plan_restore, engine, at=None, name=point)
        try:
            connection = self.connect()
        except ConnectError:
            return plan_rollback(checkpoint, None, find_restore, wanted=wanted)
        with closing(connection):
            return plan_rollback(checkpoint, connection, find_restore, wanted=wanted)


def open_checkpoints(stack: str, dsn: str | None) -> CheckpointPlace:
    """
    Open the checkpoints of a stack, or of a database that no stack of ours made.

    Raises:
        ConfigError: The stack was never brought up.
        ConnectError: No Docker engine answers.
    """
    target = find_target(stack, dsn)
    opened = open_stack(stack) if target.outputs is not None else None
    records = Records(opened.engine) if opened is not None else None
    return CheckpointPlace(target, opened, Checkpoints(lambda: target.connect("admin", autocommit=True), records))


@contextmanager
def erasure_place(stack: str, dsn: str | None, folder: Path | None) -> Iterator[Place]:
    """
    Open the database in which a user is erased, and where erasures are kept.

    Args:
        stack: Name of the stack.
        dsn: A database that no stack of ours made; its records and certificates are in `folder` alone.
        folder: Where certificates are written; by default beside the stack's CA certificate, or in the working folder.

    Raises:
        ConfigError: The stack was never brought up.
        ConnectError: The database or the Docker engine does not answer.
    """
    from memharbor.backup.erase_user import FolderRecords, Place

    target = find_target(stack, dsn)
    with closing(target.connect("admin", autocommit=True)) as connection:
        database = target.settings.database
        if target.outputs is None:
            kept = folder or Path("memharbor-erasures")
            yield Place(connection, FolderRecords(kept), kept, None, database, None)
            return
        kept = folder or ca_certificate_path(stack).parent / "erasures"
        yield Place(connection, Records(open_stack(stack).engine), kept, certificate_signer(stack), database, stack)


def certificate_signer(stack: str) -> Signer:
    """
    Make a certificate under the stack's CA, to sign one document with; nobody keeps its key.

    Raises:
        ConfigError: The stack has no secrets.
    """
    config = provisioner.read_config(stack)
    if SECRETS_KEY not in config:
        raise ConfigError(f"stack `{stack}` has no secrets yet", hint=f"run `memharbor stack init --stack {stack}`")
    leaf = create_leaf(parse_secrets(config[SECRETS_KEY]).authority, [f"erasures.{stack}"])
    return Signer(leaf.certificate, leaf.key)


def migrations_folder(stack: str, dsn: str | None) -> Path:
    """
    Name the folder of the migrations into a stack, or into a database that no stack of ours made.

    Raises:
        ConfigError: The DSN cannot be read.
    """
    from memharbor.stack.provisioner import private_folder

    if dsn:
        return Path("memharbor-migrations") / folder_name(identify_database(dsn))
    return private_folder() / stack / "migrations"


def drills_folder(stack: str) -> Path:
    """Name the folder of a stack's drill reports on this machine, with the note of their schedule."""
    from memharbor.stack.provisioner import private_folder

    return private_folder() / stack / "drills"
