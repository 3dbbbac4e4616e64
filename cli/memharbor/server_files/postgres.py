"""
Every configuration file of a database node, rendered from the settings, and where files lie in a container.

Pure: text in, text out. Read by the stack's program, which uploads the files, and by the integration tests, which run
the same images with the same files. This is the one place of server-wide settings: what belongs to a role or a database
is `ALTER ROLE/DATABASE … SET` in `sql_templates/`, and `ALTER SYSTEM` is off. PgBouncer's and the backup store's files
are in `memharbor.server_files.pgbouncer` and `memharbor.server_files.backup_store`.

Sources: PostgreSQL manual, Server Configuration; pgBackRest configuration reference.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from memharbor import versions
from memharbor.settings import Settings
from memharbor.stack.secrets import ROLE_NAMES, StackSecrets

# Where a container sees its files; `ServerFile.path` is relative to it.
FILES_ROOT = "/etc/memharbor"
DATA_ROOT = "/var/lib/postgresql"
# Below the mount, never the mount itself: Patroni deletes and recreates the data directory.
DATA_DIRECTORY = f"{DATA_ROOT}/{versions.POSTGRES_MAJOR}/data"
# Mem0's own history on its way into a physical backup, and in the data directory while that is made (docker/postgres/backup).
INCOMING_HISTORY = f"{DATA_ROOT}/{versions.POSTGRES_MAJOR}/mem0-history.incoming"
CARRIED_HISTORY = "mem0-history.db"
POSTGRES_SOCKET_DIRECTORY = "/run/postgresql"
POOLER_SOCKET_DIRECTORY = "/run/pgbouncer"
SPOOL_DIRECTORY = "/var/spool/pgbackrest"
LOCK_DIRECTORY = "/run/pgbackrest"

# Ports inside the stack's network. Reserved for other topologies: 5433, 8008, 2379, 2380, 8432.
POSTGRES_PORT = 5432
POOLER_PORT = 6432
STORE_PORT = 7070

STANZA = "main"
# pgBackRest's own limit, which stands for never.
_RETENTION_FULL_MAX = 9999999
BACKUP_TYPES = ("full", "diff", "incr")
BACKUP_PROGRAM = "/usr/local/lib/memharbor/backup"
PRUNE_PROGRAM = "/usr/local/lib/memharbor/prune"
CRONTAB = f"{FILES_ROOT}/backup/crontab"
# How scheduled backups ended, see `docker/postgres/backup`.
SCHEDULE_STATE = f"{DATA_ROOT}/{versions.POSTGRES_MAJOR}/schedule"
STORE_BUCKET = "memharbor-backup"
STORE_REGION = "us-east-1"


@dataclass(frozen=True)
class ServerFile:
    """One file in a container: its path below `FILES_ROOT`, its text, and whether only its owner may read it."""

    path: str
    content: str = field(repr=False)
    is_secret: bool = False

    @property
    def mode(self) -> str:
        """Permissions as octal digits; PostgreSQL and pgBackRest refuse or warn at wider ones for secrets."""
        return "0400" if self.is_secret else "0444"


def repository_path(stack: str) -> str:
    """
    Name the folder of a stack's physical backups inside the bucket: one stanza per stack, never shared.

    >>> repository_path("dev")
    '/pgbackrest/dev'
    """
    return f"/pgbackrest/{stack}"


# Sections of a file: a reason, and the values that it is the reason for.
Section = tuple[str, Mapping[str, str | int]]

_POSTGRES_FIXED: tuple[Section, ...] = (
    (
        "TLS and logins. A client host that vanished is noticed after 5 + 2 * 3 seconds, not after two hours.",
        {
            "password_encryption": "scram-sha-256",  # pragma: allowlist secret
            "ssl": "on",
            "ssl_cert_file": f"{FILES_ROOT}/tls/server.crt",
            "ssl_key_file": f"{FILES_ROOT}/tls/server.key",
            "ssl_min_protocol_version": "TLSv1.3",
            "tcp_keepalives_idle": 5,
            "tcp_keepalives_interval": 2,
            "tcp_keepalives_count": 3,
        },
    ),
    (
        "Server settings live in this file only.",
        {"allow_alter_system": "off"},
    ),
    (
        "Loads pgvector into each session, so that `hnsw.*` are known settings: a role that is not superuser may then"
        " set them, and a wrong value is refused at once. Not shared_preload_libraries: pgvector allocates its lock"
        " tranche in shared memory, which it cannot do while the server starts.",
        {"session_preload_libraries": "vector"},
    ),
    (
        "Planner. Tenant queries are short: compiling them costs more than it gives. Disks are solid state.",
        {"jit": "off", "random_page_cost": "1.1", "track_io_timing": "on"},
    ),
    (
        "WAL and replication: what needs a restart is set for later topologies as well.",
        {
            "wal_level": "replica",
            "wal_compression": "zstd",
            "max_wal_size": "2GB",
            "max_wal_senders": 10,
            "max_replication_slots": 10,
            "wal_keep_size": "256MB",
            "hot_standby": "on",
        },
    ),
    (
        "Log to the container's stderr, and never a memory: no statement, no parameter, and no DETAIL line, which"
        " quotes rows.",
        {
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_line_prefix": "%m [%p] %q%u@%d/%a ",
            "log_timezone": "UTC",
            "timezone": "UTC",
            "log_statement": "none",
            "log_min_error_statement": "panic",
            "log_min_duration_statement": -1,
            "log_parameter_max_length": 0,
            "log_parameter_max_length_on_error": 0,
            "log_error_verbosity": "terse",
            "log_lock_waits": "on",
            "log_temp_files": "64MB",
        },
    ),
)


def render_postgresql_conf(settings: Settings, *, archive: bool = True) -> str:
    """
    Render `postgresql.conf`, the same for every node and topology.

    Args:
        settings: The stack's settings.
        archive: Whether WAL goes to the backup store; a server without a store (tests) says no.
    """
    connections: Section = (
        "Connections. Docker publishes the port, so the server listens on all of the container's addresses.",
        {
            "listen_addresses": "*",
            "port": POSTGRES_PORT,
            "unix_socket_directories": POSTGRES_SOCKET_DIRECTORY,
            "max_connections": settings.max_connections,
        },
    )
    archiving: Section = ("The archive.", {"archive_mode": "off"})
    if archive:
        archiving = (
            archiving[0],
            {
                "archive_mode": "on",
                "archive_command": f"pgbackrest --stanza={STANZA} archive-push %p",
                "archive_timeout": f"{settings.archive_timeout_seconds}s",
            },
        )
    sections = (connections, _memory(settings), archiving, *_POSTGRES_FIXED)
    return header("#") + "".join(f"\n{comment('#', reason)}{_assignments(values)}" for reason, values in sections)


def _memory(settings: Settings) -> Section:
    memory_mb, shared_mb = settings.postgres_memory_mb, settings.shared_buffers_mb
    maintenance_mb = settings.maintenance_work_mem_mb
    work_kb = (memory_mb - shared_mb - maintenance_mb) * 1024 // 2 // settings.max_connections
    return (
        "Memory follows the container's limit. work_mem: half of what shared buffers and one index build leave, spread"
        " over all connections. autovacuum_work_mem: three workers at maintenance_work_mem each would take the memory"
        " that is meant for one index build. Source: PostgreSQL manual, Resource Consumption.",
        {
            "shared_buffers": f"{shared_mb}MB",
            "effective_cache_size": f"{memory_mb * 3 // 4}MB",
            "maintenance_work_mem": f"{maintenance_mb}MB",
            "autovacuum_work_mem": f"{max(16, maintenance_mb // 4)}MB",
            "work_mem": f"{min(65536, max(2048, work_kb))}kB",
        },
    )


def comment(mark: str, text: str) -> str:
    """Write a comment of a configuration file, wrapped; `mark` begins its lines."""
    return textwrap.fill(text, 118, initial_indent=f"{mark} ", subsequent_indent=f"{mark} ") + "\n"


def _assignments(values: Mapping[str, str | int]) -> str:
    return "".join(
        f"{name} = {value}\n" if isinstance(value, int) else f"{name} = '{value}'\n" for name, value in values.items()
    )


def render_pg_hba() -> str:
    """
    Render `pg_hba.conf`: the superuser by the socket's peer, everybody else by scram, and nothing without TLS.
    """
    return header("#") + (
        "local   all         postgres              peer\n"
        "local   replication postgres              peer\n"
        "local   all         all                   scram-sha-256\n"
        f"hostssl replication {ROLE_NAMES['replicator']}  all  scram-sha-256\n"
        "hostssl all         all                   all  scram-sha-256\n"
    )


def render_pgbackrest_conf(settings: Settings, stack: str) -> str:
    """Render `pgbackrest.conf`, the same on every node; it holds no secret."""
    return header("#") + (
        "[global]\n"
        "repo1-type=s3\n"
        f"repo1-path={repository_path(stack)}\n"
        f"repo1-s3-bucket={STORE_BUCKET}\n"
        f"repo1-s3-endpoint=backup-store:{STORE_PORT}\n"
        f"repo1-s3-region={STORE_REGION}\n"
        "repo1-s3-uri-style=path\n"
        f"repo1-storage-ca-file={FILES_ROOT}/tls/ca.crt\n"
        "repo1-cipher-type=aes-256-cbc\n"
        "repo1-bundle=y\n"
        "repo1-block=y\n"
        # How many is said at each `expire` (docker/postgres/prune): pgBackRest cannot keep a number and a number of days.
        f"repo1-retention-full={_RETENTION_FULL_MAX}\n"
        "expire-auto=n\n"
        "archive-async=y\n"
        f"spool-path={SPOOL_DIRECTORY}\n"
        f"lock-path={LOCK_DIRECTORY}\n"
        "archive-get-queue-max=128MiB\n"
        # No archive-push-queue-max: above it pgBackRest drops WAL, and PostgreSQL believes that it was archived.
        "process-max=2\n"
        "compress-type=zst\n"
        "compress-level=3\n"
        "start-fast=y\n"
        # archive-get writes a line of INFO per segment into the server's log.
        "log-level-console=warn\n"
        "log-level-file=off\n"
        "\n"
        f"[{STANZA}]\n"
        f"pg1-path={DATA_DIRECTORY}\n"
        f"pg1-socket-path={POSTGRES_SOCKET_DIRECTORY}\n"
        "pg1-user=postgres\n"
    )


def render_pgbackrest_secrets(secrets: StackSecrets) -> str:
    """Render `conf.d/secrets.conf`, which pgBackRest reads after `pgbackrest.conf`."""
    return (
        "[global]\n"
        "repo1-s3-key=pgbackrest\n"
        f"repo1-s3-key-secret={secrets.store_secrets['pgbackrest']}\n"
        f"repo1-cipher-pass={secrets.repository_passphrase}\n"
    )


def records_prefix(stack: str) -> str:
    """
    Name the folder of a stack's records (erasures, fingerprints, drills) inside the bucket, beside its backups.

    >>> records_prefix("dev")
    'memharbor/dev'
    """
    return f"memharbor/{stack}"


def render_records_curl(stack: str, secrets: StackSecrets) -> str:
    """
    Render curl's configuration for records in the backup store: the key goes to curl by file, arguments are seen by all.

    The address is where records are; a path is put behind it. Written and read with pgBackRest's own key.
    """
    return (
        f'user = "pgbackrest:{secrets.store_secrets["pgbackrest"]}"\n'
        f'aws-sigv4 = "aws:amz:{STORE_REGION}:s3"\n'
        f'cacert = "{FILES_ROOT}/tls/ca.crt"\n'
        "silent\nshow-error\nfail\nmax-time = 60\nretry = 3\n"
    )


def render_crontab(settings: Settings) -> str:
    """
    Render the crontab of supercronic: one line for each type of backup that is scheduled.

    >>> print(render_crontab(Settings(backup_schedule_full="0 3 * * 0", backup_schedule_diff="")).splitlines()[1])
    0 3 * * 0 /usr/local/lib/memharbor/backup full
    """
    schedules = {each: str(getattr(settings, f"backup_schedule_{each}")) for each in BACKUP_TYPES}
    return header("#") + "".join(f"{when} {BACKUP_PROGRAM} {each}\n" for each, when in schedules.items() if when)


def postgres_files(
    settings: Settings, stack: str, secrets: StackSecrets, node: str, *, archive: bool = True
) -> tuple[ServerFile, ...]:
    """
    List the files of one database node.

    Args:
        settings: The stack's settings.
        stack: The stack's name.
        secrets: Its secrets.
        node: The node, for instance `postgres-0`.
        archive: Whether WAL goes to the backup store.
    """
    files = (
        ServerFile("postgres/postgresql.conf", render_postgresql_conf(settings, archive=archive)),
        ServerFile("postgres/pg_hba.conf", render_pg_hba()),
        ServerFile("secrets/superuser", secrets.passwords["admin"] + "\n", is_secret=True),
        *tls_files(secrets, node),
    )
    if not archive:
        return files
    return (
        *files,
        ServerFile("pgbackrest/pgbackrest.conf", render_pgbackrest_conf(settings, stack)),
        ServerFile("pgbackrest/conf.d/secrets.conf", render_pgbackrest_secrets(secrets), is_secret=True),
        ServerFile("backup/crontab", render_crontab(settings)),
        ServerFile("backup/database", settings.database + "\n"),
        ServerFile("backup/retention", f"{settings.backup_retention_full} {settings.backup_retention_days}\n"),
        ServerFile("records/curl", render_records_curl(stack, secrets), is_secret=True),
        ServerFile("records/bucket", f"https://backup-store:{STORE_PORT}/{STORE_BUCKET}\n"),
        ServerFile("records/prefix", records_prefix(stack) + "\n"),
    )


def tls_files(secrets: StackSecrets, node: str) -> tuple[ServerFile, ...]:
    """List what every server has: the CA's certificate, and its own certificate and key."""
    pair = secrets.certificates[node]
    return (
        ServerFile("tls/ca.crt", secrets.authority.certificate),
        ServerFile("tls/server.crt", pair.certificate),
        ServerFile("tls/server.key", pair.key, is_secret=True),
    )


def header(mark: str) -> str:
    """Write the first line of a configuration file."""
    return f"{mark} Written by `pulumi up` from the stack's settings; a change made here is lost.\n"
