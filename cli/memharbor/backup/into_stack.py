"""
Restore into another stack: its database becomes what this stack's was at the target.

The restore happens in a throw-away container, is verified there and given the other stack's passwords; then it is copied
beside the other stack's data directory and takes its place in one step, for which that stack is stopped. Until that step
the other stack goes on as it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from memharbor.backup.plan import RestorePlan
from memharbor.backup.restore import RECOVERY_TIMEOUT_SECONDS, OnOpen
from memharbor.backup.sandbox import Opened, Sandbox, restored
from memharbor.backup.server import ask_server, refuse_small_disk
from memharbor.backup.wal import format_lsn
from memharbor.errors import ExternalToolError, MemharborError, StateRefusedError
from memharbor.output import Output
from memharbor.pooler import Pooler
from memharbor.server_files.postgres import DATA_DIRECTORY, DATA_ROOT
from memharbor.templates import literal, render

_PLACE = "/target"
_DATA = DATA_DIRECTORY.removeprefix(DATA_ROOT)

# The throw-away server archives nothing: the other stack's archive must get the histories of the timelines, or its
# backups would lead nowhere. A copy that was killed is begun anew. Source of the lock: docker/postgres/entrypoint.
_COPY = """
set -eu
incoming=$1.incoming
rm -rf "$incoming"
cp -a "$PGDATA" "$incoming"
for file in "$incoming"/pg_wal/*.history; do
  [ ! -f "$file" ] || touch "$incoming/pg_wal/archive_status/${file##*/}.ready"
done
sync -f "$incoming"
"""
# One step: there is never a moment without a data directory, of which the entrypoint would make a new, empty cluster.
_SWAP = """
set -eu
exec 9>> "${1%/*}/lock"
flock --nonblock 9 || { echo 'another container works on this volume' >&2; exit 65; }
if [ -d "$1" ]; then mv --exchange --no-copy -T "$1.incoming" "$1"; else mv -T "$1.incoming" "$1"; fi
rm -rf "$1.incoming" "${1%/*}/wal-before-restore"
sync -f "$1"
"""


class TargetStack(Opened, Protocol):
    """The stack that is restored into; `memharbor.operations.OpenStack` is one."""

    @property
    def pooler(self) -> Pooler:
        """Its PgBouncers."""

    @property
    def pool_databases(self) -> list[str]:
        """PgBouncer's names for the database."""


@dataclass(frozen=True)
class StackReport:
    """What was restored into another stack."""

    plan: RestorePlan
    stack: str
    reached_lsn: int
    erasures_replayed: int

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            **self.plan.as_data(),
            "reached_lsn": format_lsn(self.reached_lsn),
            "into": self.stack,
            "erasures_replayed": self.erasures_replayed,
        }


def refuse_stack(source: Opened, target: TargetStack, *, replace: bool) -> None:
    """
    Refuse a stack that cannot be restored into.

    Args:
        source: The stack whose backups are restored.
        target: The other one.
        replace: Whether memories that it has may be replaced.

    Raises:
        StateRefusedError: It is the same stack, has another database name, is down, or is not empty.
    """
    name, theirs, ours = target.outputs.stack, target.outputs.database, source.outputs.database
    if source.engine.container == target.engine.container:
        raise StateRefusedError(f"`{name}` is the very stack that is restored", hint="leave `--into` out")
    if theirs != ours:
        raise StateRefusedError(f"stack `{name}` serves database `{theirs}`, and the backup has `{ours}`")
    if not target.containers.is_running(target.engine.container):
        raise StateRefusedError(f"stack `{name}` is down", hint=f"run `pulumi up --refresh --stack {name}`")
    count = count_memories(target)
    if count and not replace:
        raise StateRefusedError(
            f"stack `{name}` has {count:,} memories", hint="pass `--replace` to drop them, or bring up an empty stack"
        )


def count_memories(target: TargetStack) -> int:
    """Count the memories of a stack whose server runs; its database need not be there yet, nor the schema."""
    containers, container, database = target.containers, target.engine.container, target.outputs.database
    exists = f"select exists (select from pg_database where datname = {literal(database)})"  # noqa: S608 - quoted
    if ask_server(containers, container)(exists) != "t":
        return 0
    query = ask_server(containers, container, database=database)
    if query("select to_regclass('memharbor.memories') is not null") != "t":
        return 0
    return int(query("select count(*) from memharbor.memories"))


def restore_into_stack(
    source: Opened,
    plan: RestorePlan,
    target: TargetStack,
    output: Output,
    *,
    verifiers: Mapping[str, str],
    on_open: OnOpen,
) -> StackReport:
    """
    Restore a plan into another stack, which `refuse_stack` did not refuse.

    Args:
        source: The stack whose backups are restored.
        plan: What to restore.
        target: The other stack, on the same Docker engine.
        output: Where progress is said.
        verifiers: SCRAM verifiers of the other stack's passwords, by role.
        on_open: Called with the restored database before the other stack gets it.

    Raises:
        StateRefusedError: There is not enough disk; the other stack is as it was.
        ExternalToolError: pgBackRest, PostgreSQL or the copy failed; the message says what is left.
        VerificationError: Less was reached than the plan asks for; the other stack is as it was.
    """
    refuse_small_disk(target.engine.run_beside, plan.backup.database_bytes)
    volume = _data_volume(target)
    # Its archive may hold timelines of this very cluster, from an earlier restore: their segments would be in the way.
    taken = {segment.timeline for segment in target.engine.list_segments()} | set(target.engine.timeline_births())
    with restored(source, plan, output, writable={volume: _PLACE}, above_timeline=max(taken, default=0)) as sandbox:
        replayed = len(on_open(sandbox.rows()))
        _set_passwords(sandbox, verifiers)
        sandbox.clear_recovery_settings()
        sandbox.stop()
        with output.step(f"Copy it to stack {target.outputs.stack}"):
            _run(sandbox, _COPY, "be copied")
        _take_over(target, sandbox, output)
    return StackReport(plan, target.outputs.stack, sandbox.reached_lsn, replayed)


def _data_volume(target: TargetStack) -> str:
    mounts = target.containers.get(target.engine.container).attrs["Mounts"]
    return next(str(mount["Name"]) for mount in mounts if mount["Destination"] == DATA_ROOT)


def _set_passwords(sandbox: Sandbox, verifiers: Mapping[str, str]) -> None:
    known = {row[0] for row in sandbox.rows("postgres").query("select rolname from pg_roles")}
    for role, verifier in verifiers.items():
        if role in known:
            sandbox.rows("postgres").query(render("roles/password.sql", {"role": role, "verifier": verifier}))


def _take_over(target: TargetStack, sandbox: Sandbox, output: Output) -> None:
    """Stop the other stack, put the new data directory in the place of its own, and start it."""
    container, containers = target.engine.container, target.containers
    try:
        with output.step("Pause its pool and stop its server"):
            target.pooler.pause(target.pool_databases)
            containers.stop(container)
        with output.step("Put the restored database into its place"):
            _run(sandbox, _SWAP, "take its place")
            containers.start(container)
            _wait_until_open(target)
            target.engine.adopt_cluster()
    except MemharborError as exc:
        raise ExternalToolError(
            f"{exc.message}\nclients of stack {target.outputs.stack} wait at its paused pool",
            hint=["run the command again with `--replace`", *exc.hints[:1]],
        ) from exc
    except BaseException:
        output.note(f"stack {target.outputs.stack} may be stopped: run the command again with `--replace`")
        raise
    with output.step("Resume its pool"):
        target.pooler.resume(target.pool_databases)


def _run(sandbox: Sandbox, script: str, doing: str) -> None:
    done = sandbox.execute(["sh", "-c", script, "sh", f"{_PLACE}{_DATA}"])
    if done.exit_code != 0:
        raise ExternalToolError(f"the restored database could not {doing}: {done.last_words}")


def _wait_until_open(target: TargetStack) -> None:
    query = ask_server(target.containers, target.engine.container)
    deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            if query("select pg_is_in_recovery()") == "f":
                return
        except (ExternalToolError, StateRefusedError):
            pass  # it does not answer yet
        time.sleep(0.3)
    raise ExternalToolError(f"the server of stack {target.outputs.stack} did not open")
