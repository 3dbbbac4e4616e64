"""
The services of a stack that is up: its containers, its pooler, its certificates, its backups.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from memharbor.backup.archive_lag import is_behind, is_disk_short, lag_text, read_lag
from memharbor.backup.custodian import works_text
from memharbor.containers import Containers
from memharbor.doctor.findings import Finding, Findings, collect
from memharbor.operations import open_custodian, open_stack
from memharbor.output import age_text
from memharbor.stack import StackOutputs, find_leader, provisioner
from memharbor.stack.certificates import RENEWAL_DAYS, find_expiry
from memharbor.stack.config import SECRETS_KEY
from memharbor.stack.handshake import read_served_certificate
from memharbor.stack.secrets import parse_secrets
from memharbor.target import Target

ARCHIVE_LAG_MAXIMUM_SEGMENTS = 4


def check_services(target: Target, outputs: StackOutputs) -> list[Finding]:
    """Look at everything that runs beside the database."""
    leader, pooler = find_leader(outputs).container, outputs.containers["pgbouncer"][0]
    checks = (
        ("containers", lambda: check_containers(outputs), "docker ps --all"),
        ("pooler", lambda: check_pooler(outputs), f"docker logs {pooler}"),
        ("certificates", lambda: check_certificates(outputs), "memharbor status"),
        ("backup", lambda: check_backups(outputs), f"docker logs {leader}"),
        ("archive", lambda: check_archive(target, outputs), f"docker logs {leader}"),
        ("custodian", lambda: check_custodian(outputs), "memharbor backup offsite status"),
    )
    return [finding for area, check, otherwise in checks for finding in collect(area, check, otherwise)]


def check_containers(outputs: StackOutputs) -> Findings:
    """Ask the engine how each container is."""
    containers = Containers()
    names = [node.container for node in outputs.nodes] + [
        name for group in outputs.containers.values() for name in group
    ]
    for name in names:
        if containers.find(name) is None:
            yield Finding("containers", "failed", f"`{name}` does not exist", "pulumi up --refresh")
            continue
        health = containers.health(name)
        if health == "healthy":
            yield Finding("containers", "ok", f"`{name}` is healthy")
        elif health == "starting":
            yield Finding("containers", "warning", f"`{name}` is starting", "wait a few seconds, then memharbor doctor")
        elif health in ("exited", "created"):
            yield Finding("containers", "failed", f"`{name}` is stopped", f"docker start {name}")
        else:
            yield Finding("containers", "failed", f"`{name}` is {health}", f"docker logs {name}")


def check_pooler(outputs: StackOutputs) -> Findings:
    """Look whether a session's identity ends with it, and whether clients are let in."""
    pooler = open_stack(outputs.stack).pooler
    for row in pooler.show("config"):
        if row["key"] == "server_reset_query_always" and row["value"] != "1":
            cause = f"{row['pooler']} lets a session's identity reach the next client"
            yield Finding("pooler", "failed", cause, "pulumi up")
        if row["key"] == "server_reset_query":
            good = any(reset in row["value"].lower() for reset in ("reset app.user_id", "reset all", "discard all"))
            cause = "identity is reset between clients" if good else "`server_reset_query` does not reset app.user_id"
            yield Finding("pooler", "ok" if good else "failed", cause, "" if good else "pulumi up")
    paused = {row["name"]: row["pooler"] for row in pooler.show("databases") if row["paused"] == "1"}
    if paused:
        way_out = (
            "repeat the `memharbor restore` that stopped; to let clients in without it: docker restart "
            + " ".join(sorted(set(paused.values())))
        )
        yield Finding("pooler", "failed", f"{', '.join(sorted(paused))} paused: clients wait", way_out)


def check_certificates(outputs: StackOutputs, *, now: datetime | None = None) -> Findings:
    """Look until when the CA and the certificates are valid, as the servers show them."""
    renew = "memharbor stack init, then pulumi up"
    # Nobody renews a CA in place: what trusts the old one would be locked out.
    replace = "make a stack under a new name, and move the memories there with a dump"
    expiries = [("the CA", find_expiry(outputs.ca_certificate), replace)]
    expiries += [(name, find_expiry(certificate), renew) for name, certificate in _leaf_certificates(outputs)]
    good = True
    for name, expires_at, step in expiries:
        days_left = (expires_at - (now or datetime.now(UTC))).total_seconds() / 86_400
        if days_left < RENEWAL_DAYS:
            good = False
            said = f"the certificate of {name} " + ("expired" if days_left <= 0 else "expires")
            yield Finding(
                "certificates", "failed" if days_left <= 0 else "warning", f"{said} on {expires_at:%Y-%m-%d}", step
            )
    if good:
        earliest = min(expires_at for _, expires_at, _ in expiries)
        yield Finding("certificates", "ok", f"valid until {earliest:%Y-%m-%d}")


def _leaf_certificates(outputs: StackOutputs) -> Iterator[tuple[str, str]]:
    for name, endpoint in (("postgres", outputs.endpoints.rw), ("pgbouncer", outputs.endpoints.pool)):
        yield name, read_served_certificate(endpoint.host, endpoint.port)
    # The store publishes no port: what it was given is in the config.
    secrets = parse_secrets(provisioner.read_config(outputs.stack).get(SECRETS_KEY, ""))
    for name, pair in secrets.certificates.items():
        if name.startswith("backup-store"):
            yield name, pair.certificate


def check_backups(outputs: StackOutputs) -> Findings:
    """Look whether there is something to restore, and whether it is of this very cluster."""
    engine = open_stack(outputs.stack).engine
    foreign = engine.foreign_system_id()
    if foreign is not None:
        cause = (
            f"the repository's backups are of another cluster than the running one (system identifier {foreign}),"
            " which is new and cannot be archived: the data volume was lost or replaced"
        )
        yield Finding("backup", "failed", cause, "memharbor restore")
    good = [backup for backup in engine.list_backups() if not backup.has_error]
    if good:
        yield Finding("backup", "ok", f"{len(good)} backups, the newest of {good[-1].ended_at:%Y-%m-%d %H:%M} UTC")
    else:
        yield Finding("backup", "warning", "there is no backup yet", "memharbor backup create")


def check_archive(target: Target, outputs: StackOutputs) -> Findings:
    """Look whether WAL reaches the backup store, and how long the disk lasts where it does not."""
    engine = open_stack(outputs.stack).engine
    with target.connect(autocommit=True) as connection:
        lag = read_lag(connection, engine)
    look = f"docker logs --tail 50 {engine.container}"
    if is_disk_short(lag):
        cause = (
            f"PostgreSQL stops when the disk is full, in about {age_text(lag['seconds_until_full'])}: {lag_text(lag)}"
        )
        yield Finding("archive", "failed", cause, f"{look}, then docker logs {outputs.containers['backup_store'][0]}")
    elif lag["is_failing"] or is_behind(lag) or lag["waiting_segments"] > ARCHIVE_LAG_MAXIMUM_SEGMENTS:
        yield Finding("archive", "failed", f"WAL waits for the backup store: {lag_text(lag)}", look)
    else:
        yield Finding("archive", "ok", "WAL reaches the backup store")


def check_custodian(outputs: StackOutputs, *, now: datetime | None = None) -> Findings:
    """Look whether the off-site copy follows, and whether old versions are purged."""
    works = open_custodian(outputs.stack).works(now=now or datetime.now(UTC))
    if works["copy_failure"] or works["is_copy_behind"]:
        yield Finding("custodian", "failed", works_text(works), "memharbor backup offsite copy")
    elif works["purge_failure"]:
        # The store only grows; nothing is lost.
        yield Finding("custodian", "warning", works_text(works), "memharbor backup purge")
    else:
        yield Finding("custodian", "ok", works_text(works))
