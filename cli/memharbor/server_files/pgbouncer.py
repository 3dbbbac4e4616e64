"""
Every configuration file of PgBouncer, rendered from the settings.

Pure, like `memharbor.server_files.postgres`; also what `memharbor config pgbouncer` prints for a pooler that is not ours.

Source: PgBouncer configuration manual.
"""

from __future__ import annotations

from memharbor.server_files.postgres import (
    FILES_ROOT,
    POOLER_PORT,
    POOLER_SOCKET_DIRECTORY,
    POSTGRES_PORT,
    Section,
    ServerFile,
    comment,
    header,
    tls_files,
)
from memharbor.settings import RESERVED_CONNECTIONS, Settings
from memharbor.stack.secrets import ROLE_NAMES, StackSecrets

# How long PgBouncer keeps a client waiting for a server.
CLIENT_WAIT_SECONDS = 300


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
        comment(";", reason) + "".join(f"{name} = {value}\n" for name, value in values.items())
        for reason, values in (pools, *_POOLER_FIXED)
    )
    return header(";") + "\n[databases]\n" + "\n".join(databases) + "\n\n[pgbouncer]\n" + sections


def render_pgbouncer_users(secrets: StackSecrets) -> str:
    """Render PgBouncer's `auth_file`: only the role that asks the database for everybody else."""
    return f'"{ROLE_NAMES["pooler"]}" "{secrets.passwords["pooler"]}"\n'


def pgbouncer_files(
    settings: Settings, secrets: StackSecrets, node: str, *, any_database: bool = False
) -> tuple[ServerFile, ...]:
    """List the files of one PgBouncer; the arguments are those of `postgres_files` and `render_pgbouncer_ini`."""
    return (
        ServerFile("pgbouncer/pgbouncer.ini", render_pgbouncer_ini(settings, any_database=any_database)),
        ServerFile("pgbouncer/users.txt", render_pgbouncer_users(secrets), is_secret=True),
        *tls_files(secrets, node),
    )
