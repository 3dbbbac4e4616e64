"""
Every configuration file of the servers, rendered from the settings: PostgreSQL, pgBackRest and PgBouncer.

Pure: text in, text out. Read by the stack's program (which uploads the files), by the integration tests (which run the
same images with the same files) and by `memharbor config pgbouncer`. This is the one place of server-wide settings:
what belongs to a role or a database is `ALTER ROLE/DATABASE … SET` in `sql_templates/`, and `ALTER SYSTEM` is off.

Sources: PostgreSQL manual, Server Configuration; pgBackRest configuration reference; PgBouncer config manual.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from memharbor import versions
from memharbor.settings import Settings
from memharbor.stack_secrets import ROLE_NAMES, StackSecrets

# Where a container sees its files; `ServerFile.path` is relative to it.
FILES_ROOT = "/etc/memharbor"
DATA_ROOT = "/var/lib/postgresql"
# Below the mount, never the mount itself: Patroni deletes and recreates the data directory.
DATA_DIRECTORY = f"{DATA_ROOT}/{versions.POSTGRES_MAJOR}/data"
POSTGRES_SOCKET_DIRECTORY = "/run/postgresql"
POOLER_SOCKET_DIRECTORY = "/run/pgbouncer"
SPOOL_DIRECTORY = "/var/spool/pgbackrest"
LOCK_DIRECTORY = "/run/pgbackrest"

# Ports inside the stack's network. Reserved for other topologies: 5433, 8008, 2379, 2380, 8432.
POSTGRES_PORT = 5432
POOLER_PORT = 6432
STORE_PORT = 7070

STANZA = "main"
STORE_BUCKET = "memharbor-backup"
STORE_REGION = "us-east-1"

# How long PgBouncer keeps a client waiting for a server.
CLIENT_WAIT_SECONDS = 300

# Connections that pools leave to administration, rollout, backup and monitoring.
RESERVED_CONNECTIONS = 10


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


def pool_names(database: str) -> dict[str, str]:
    """
    Name PgBouncer's databases: read-write and read-only in transactions, and one with a session per client.

    >>> pool_names("memharbor")["read_only"]
    'memharbor_ro'
    """
    return {"read_write": database, "read_only": f"{database}_ro", "session": f"{database}_session"}


def pool_limits(settings: Settings) -> dict[str, int]:
    """
    Share PostgreSQL's connections among the pools so that all of them, full at once, never exceed what it accepts.

    >>> pool_limits(Settings())
    {'session': 20, 'read_only': 23, 'read_write': 47}
    """
    budget = settings.max_connections - RESERVED_CONNECTIONS
    session = max(1, min(2 * settings.pool_session_size, budget // 3))
    read_only = max(1, (budget - session) // 3)
    return {"session": session, "read_only": read_only, "read_write": budget - session - read_only}


# Sections of a file: a reason, and the values that it is the reason for.
Section = tuple[str, Mapping[str, str | int]]

_POSTGRES_FIXED: tuple[Section, ...] = (
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
        "TLS and logins. A client host that vanished is noticed after 5 + 2 * 3 seconds, not after two hours.",
        {
            "password_encryption": "scram-sha-256",
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
    return _header("#") + "".join(f"\n{_comment('#', reason)}{_assignments(values)}" for reason, values in sections)


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


def _comment(mark: str, text: str) -> str:
    return textwrap.fill(text, 118, initial_indent=f"{mark} ", subsequent_indent=f"{mark} ") + "\n"


def _assignments(values: Mapping[str, str | int]) -> str:
    return "".join(
        f"{name} = {value}\n" if isinstance(value, int) else f"{name} = '{value}'\n" for name, value in values.items()
    )


def render_pg_hba() -> str:
    """
    Render `pg_hba.conf`: the superuser by the socket's peer, everybody else by scram, and nothing without TLS.
    """
    return _header("#") + (
        "local   all         postgres              peer\n"
        "local   all         all                   scram-sha-256\n"
        f"hostssl replication {ROLE_NAMES['replicator']}  all  scram-sha-256\n"
        "hostssl all         all                   all  scram-sha-256\n"
    )


def render_pgbackrest_conf(settings: Settings, stack: str) -> str:
    """Render `pgbackrest.conf`, the same on every node; it holds no secret."""
    return _header("#") + (
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
        f"repo1-retention-full={settings.backup_retention_full}\n"
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


# `reset all` covers app.user_id, request.jwt.claims and whatever else a policy may read one day; it leaves the role,
# which `reset session authorization` covers.
SERVER_RESET_QUERY = (
    "reset session authorization; reset all; close all; unlisten *; select pg_advisory_unlock_all(); discard temp"
)

_POOLER_FIXED: tuple[Section, ...] = (
    (
        "Clients: TLS on the network; the socket is for the administration console, by the same user only."
        " JDBC sends extra_float_digits; ignoring `options` as well would silently drop what a client relies on.",
        {
            "listen_addr": "*",
            "listen_port": POOLER_PORT,
            "unix_socket_dir": POOLER_SOCKET_DIRECTORY,
            "client_tls_sslmode": "require",
            "client_tls_protocols": "tlsv1.3",
            "client_tls_cert_file": f"{FILES_ROOT}/tls/server.crt",
            "client_tls_key_file": f"{FILES_ROOT}/tls/server.key",
            "ignore_startup_parameters": "extra_float_digits",
        },
    ),
    (
        "Who may log in is asked of the database, so that a new password needs no restart.",
        {
            "auth_type": "scram-sha-256",
            "auth_user": ROLE_NAMES["pooler"],
            "auth_query": "select username, secret from memharbor_pooler.lookup($1)",
            "auth_file": f"{FILES_ROOT}/pgbouncer/users.txt",
        },
    ),
    (
        "What a client leaves on a server connection must not reach the next client: identity and every other"
        " setting, a role, cursors WITH HOLD, temporary tables, listeners, advisory locks. `discard all` would do it"
        " too, but also forget the prepared statements, at half of the throughput.",
        {"server_reset_query": SERVER_RESET_QUERY, "server_reset_query_always": 1, "max_prepared_statements": 200},
    ),
    (
        "Servers: verified TLS; failures are noticed and retried within seconds, not after the default 15.",
        {
            "server_tls_sslmode": "verify-full",
            "server_tls_protocols": "tlsv1.3",
            "server_tls_ca_file": f"{FILES_ROOT}/tls/ca.crt",
            "server_login_retry": 1,
            "server_connect_timeout": 3,
            "dns_max_ttl": 2,
            "tcp_keepidle": 5,
            "tcp_keepintvl": 2,
            "tcp_keepcnt": 3,
            "tcp_user_timeout": 10000,
        },
    ),
    (
        "A restore or a switch of leader pauses the pools, and clients wait. Five minutes cover the restore of about"
        " ten gigabytes and, by far, a failover; who waits longer gets an error and tries again.",
        {"query_wait_timeout": CLIENT_WAIT_SECONDS, "client_login_timeout": CLIENT_WAIT_SECONDS},
    ),
    (
        "Two lines per connection would fill the log and say nothing.",
        {"log_connections": 0, "log_disconnections": 0, "log_stats": 0},
    ),
)


def render_pgbouncer_ini(
    settings: Settings, *, host: str = "postgres", port: int = POSTGRES_PORT, any_database: bool = False
) -> str:
    """
    Render `pgbouncer.ini`.

    Args:
        settings: The stack's settings.
        host: The service that leads to the database, never a node.
        port: Its port.
        any_database: Also pool every database under its own name; for tests, which make databases as they go.
    """
    names, limits = pool_names(settings.database), pool_limits(settings)
    server = f"host={host} port={port}"
    target = f"{server} dbname={settings.database}"
    databases = [
        f"{names['read_write']} = {target} max_db_connections={limits['read_write']}",
        f"{names['read_only']} = {target} max_db_connections={limits['read_only']}",
        f"{names['session']} = {target} max_db_connections={limits['session']}"
        f" pool_mode=session pool_size={settings.pool_session_size}",
    ]
    if any_database:
        databases.append(f"* = {server} max_db_connections={limits['read_write']}")
    pools: Section = (
        "Pools.",
        {
            "pool_mode": "transaction",
            "default_pool_size": settings.pool_size,
            "max_client_conn": settings.pool_max_clients,
        },
    )
    sections = "\n".join(
        _comment(";", reason) + "".join(f"{name} = {value}\n" for name, value in values.items())
        for reason, values in (pools, *_POOLER_FIXED)
    )
    return _header(";") + "\n[databases]\n" + "\n".join(databases) + "\n\n[pgbouncer]\n" + sections


def render_pgbouncer_users(secrets: StackSecrets) -> str:
    """Render PgBouncer's `auth_file`: only the role that asks the database for everybody else."""
    return f'"{ROLE_NAMES["pooler"]}" "{secrets.passwords["pooler"]}"\n'


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
    )


def pgbouncer_files(
    settings: Settings, secrets: StackSecrets, node: str, *, any_database: bool = False
) -> tuple[ServerFile, ...]:
    """List the files of one PgBouncer; the arguments are those of `postgres_files` and `render_pgbouncer_ini`."""
    return (
        ServerFile("pgbouncer/pgbouncer.ini", render_pgbouncer_ini(settings, any_database=any_database)),
        ServerFile("pgbouncer/users.txt", render_pgbouncer_users(secrets), is_secret=True),
        *tls_files(secrets, node),
    )


def tls_files(secrets: StackSecrets, node: str) -> tuple[ServerFile, ...]:
    """List what every server has: the CA's certificate, and its own certificate and key."""
    pair = secrets.certificates[node]
    return (
        ServerFile("tls/ca.crt", secrets.authority.certificate),
        ServerFile("tls/server.crt", pair.certificate),
        ServerFile("tls/server.key", pair.key, is_secret=True),
    )


def _header(comment: str) -> str:
    return f"{comment} Written by `pulumi up` from the stack's settings; a change made here is lost.\n"
