"""The files of the servers: they follow the settings, and the rules that keep data safe stand in them."""

from __future__ import annotations

import configparser
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.errors import ConfigError
from memharbor.server_files import backup_store, custodian, pgbouncer, postgres
from memharbor.server_files.pgbouncer import pool_limits, render_pgbouncer_ini, render_pgbouncer_users
from memharbor.server_files.postgres import (
    ServerFile,
    render_pg_hba,
    render_pgbackrest_conf,
    render_pgbackrest_secrets,
    render_postgresql_conf,
)
from memharbor.settings import RESERVED_CONNECTIONS, Settings, load_settings
from memharbor.stack.secrets import ROLE_NAMES, certificate_nodes, complete_secrets

SECRETS = complete_secrets("dev", certificate_nodes(Settings()))


def postgresql_conf(**settings: object) -> dict[str, str]:
    text = render_postgresql_conf(load_settings(("test", settings))[0])
    pairs = [line.split(" = ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs), "a setting stands there twice"
    return {name: value.strip("'") for name, value in pairs}


def ini(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True, comment_prefixes=("#", ";"))
    parser.read_string(text)
    return parser


def pgbouncer_ini(**options: object) -> configparser.ConfigParser:
    return ini(render_pgbouncer_ini(Settings(), **options))  # type: ignore[arg-type]


def test_memory_follows_the_container() -> None:
    conf = postgresql_conf(postgres_memory_mb=8192, maintenance_work_mem_mb=1024, max_connections=200)
    assert conf["shared_buffers"] == "2048MB"
    assert conf["maintenance_work_mem"] == "1024MB"
    assert conf["effective_cache_size"] == "6144MB"
    assert conf["max_connections"] == "200"


@given(memory_mb=st.integers(256, 262_144), maintenance_share=st.integers(8, 40), connections=st.integers(40, 2000))
def test_work_memory_stays_in_its_bounds(memory_mb: int, maintenance_share: int, connections: int) -> None:
    try:
        conf = postgresql_conf(
            postgres_memory_mb=memory_mb,
            maintenance_work_mem_mb=max(16, memory_mb // maintenance_share),
            max_connections=connections,
        )
    except ConfigError:
        return
    assert 2048 <= int(conf["work_mem"].removesuffix("kB")) <= 65536
    assert int(conf["autovacuum_work_mem"].removesuffix("MB")) >= 16


def test_wal_is_archived_and_never_dropped() -> None:
    conf = postgresql_conf(archive_timeout_seconds=30)
    assert conf["archive_mode"] == "on"
    assert conf["archive_command"] == "pgbackrest --stanza=main archive-push %p"
    assert conf["archive_timeout"] == "30s"
    assert "archive-push-queue-max" not in render_pgbackrest_conf(Settings(), "dev")


def test_a_server_without_a_store_archives_nothing() -> None:
    text = render_postgresql_conf(Settings(), archive=False)
    assert "archive_mode = 'off'" in text
    assert "archive_command" not in text


def test_nothing_that_a_memory_says_reaches_the_log() -> None:
    conf = postgresql_conf()
    assert conf["log_statement"] == "none"
    assert conf["log_min_error_statement"] == "panic"
    assert conf["log_min_duration_statement"] == "-1"
    assert conf["log_parameter_max_length_on_error"] == "0"
    assert conf["log_error_verbosity"] == "terse"


def test_the_file_is_the_only_place_of_server_settings() -> None:
    assert postgresql_conf()["allow_alter_system"] == "off"


def test_nobody_logs_in_without_tls_and_a_password_but_the_superuser_on_the_socket() -> None:
    lines = [line.split() for line in render_pg_hba().splitlines() if not line.startswith("#")]
    assert lines == [
        ["local", "all", "postgres", "peer"],
        ["local", "replication", "postgres", "peer"],
        ["local", "all", "all", "scram-sha-256"],
        ["hostssl", "replication", "memharbor_replicator", "all", "scram-sha-256"],
        ["hostssl", "all", "all", "all", "scram-sha-256"],
    ]


def test_each_stack_has_a_repository_of_its_own() -> None:
    paths = {ini(render_pgbackrest_conf(Settings(), stack))["global"]["repo1-path"] for stack in ("dev", "prod")}
    assert len(paths) == 2


def test_retention_follows_the_settings() -> None:
    settings = Settings(backup_retention_full=7, backup_retention_days=30)
    files = {file.path: file.content for file in postgres.postgres_files(settings, "dev", SECRETS, "postgres-0")}
    assert files["backup/retention"] == "7 30\n"
    # Whoever calls pgBackRest by hand expires nothing.
    conf = ini(render_pgbackrest_conf(settings, "dev"))
    assert conf["global"]["expire-auto"] == "n"
    assert int(conf["global"]["repo1-retention-full"]) > 1_000_000
    assert conf["global"]["log-level-console"] == "warn"
    assert conf["main"]["pg1-path"] == "/var/lib/postgresql/18/data"


def test_the_keys_of_the_repository_are_in_a_file_of_their_own() -> None:
    secrets = ini(render_pgbackrest_secrets(SECRETS))["global"]
    assert secrets["repo1-cipher-pass"] == SECRETS.repository_passphrase
    assert secrets["repo1-s3-key-secret"] == SECRETS.store_secrets["pgbackrest"]
    assert not set(secrets) & set(ini(render_pgbackrest_conf(Settings(), "dev"))["global"])


def test_the_pooler_offers_three_ways_to_one_database() -> None:
    databases = dict(pgbouncer_ini()["databases"])
    assert set(databases) == {"memharbor", "memharbor_ro", "memharbor_session"}
    assert all("host=postgres port=5432 dbname=memharbor " in target for target in databases.values())
    assert "pool_mode=session" in databases["memharbor_session"]


def test_the_pooler_verifies_and_is_verified() -> None:
    options = pgbouncer_ini()["pgbouncer"]
    assert options["server_tls_sslmode"] == "verify-full"
    assert options["client_tls_sslmode"] == "require"
    assert options["auth_type"] == "scram-sha-256"
    assert "admin_users" not in options


def test_the_pooler_forgets_a_client_but_not_its_prepared_statements() -> None:
    options = pgbouncer_ini()["pgbouncer"]
    assert options["server_reset_query_always"] == "1"
    reset = options["server_reset_query"]
    for part in ("reset session authorization", "reset all", "close all", "discard temp", "pg_advisory_unlock_all"):
        assert part in reset
    assert "discard all" not in reset
    assert "deallocate" not in reset
    assert int(options["max_prepared_statements"]) > 0


def test_any_database_is_pooled_only_when_asked_for() -> None:
    assert "*" not in pgbouncer_ini()["databases"]
    assert "*" in pgbouncer_ini(any_database=True)["databases"]


@given(connections=st.integers(20, 2000), session=st.integers(1, 1000))
def test_full_pools_never_overrun_the_server(connections: int, session: int) -> None:
    limits = pool_limits(Settings.model_construct(max_connections=connections, pool_session_size=session))
    assert all(limit >= 1 for limit in limits.values())
    assert sum(limits.values()) <= connections - RESERVED_CONNECTIONS


def test_the_poolers_own_file_names_only_the_role_that_asks() -> None:
    assert render_pgbouncer_users(SECRETS) == f'"memharbor_pooler" "{SECRETS.passwords["pooler"]}"\n'


def test_the_backup_key_can_delete_objects_but_no_version() -> None:
    statements = json.loads(backup_store.render_store_policy())["Statement"]
    allowed = [
        action
        for statement in statements
        if statement["Principal"]["AWS"] == ["pgbackrest"]
        for action in statement["Action"]
    ]
    assert "s3:DeleteObject" in allowed
    assert not {"s3:*", "s3:DeleteObjectVersion", "s3:PutBucketVersioning", "s3:PutBucketPolicy"} & set(allowed)


def test_the_owner_of_the_bucket_is_named_in_its_policy() -> None:
    first = json.loads(backup_store.render_store_policy())["Statement"][0]
    assert first["Principal"]["AWS"] == ["custodian"]
    assert first["Action"] == "s3:*"


def test_nobody_in_the_store_is_an_administrator() -> None:
    accounts = json.loads(backup_store.render_store_users(SECRETS))["accessAccounts"]
    assert set(accounts) == {"custodian", "pgbackrest"}
    assert {account["role"] for account in accounts.values()} == {"user"}


ALL_FILES = {
    "postgres": postgres.postgres_files(Settings(), "dev", SECRETS, "postgres-0"),
    "pgbouncer": pgbouncer.pgbouncer_files(Settings(), SECRETS, "pgbouncer-0"),
    "backup-store": backup_store.store_files(SECRETS, "backup-store-0"),
    "custodian": custodian.custodian_files(Settings(), "dev", SECRETS, None),
}


@pytest.mark.parametrize("service", ALL_FILES)
def test_a_file_with_a_secret_is_marked_as_one(service: str) -> None:
    secret_values = [
        *SECRETS.passwords.values(),
        *SECRETS.store_secrets.values(),
        SECRETS.repository_passphrase,
        *(pair.key for pair in SECRETS.certificates.values()),
    ]
    for file in ALL_FILES[service]:
        assert file.is_secret == any(value in file.content for value in secret_values), file.path
        assert file.mode == ("0400" if file.is_secret else "0444")
        assert not file.is_secret or file.content not in repr(file)


@pytest.mark.parametrize("service", ALL_FILES)
def test_a_service_gets_no_secret_that_it_does_not_need(service: str) -> None:
    whole = "".join(file.content for file in ALL_FILES[service])
    needed = {"postgres": {"admin"}, "pgbouncer": {"pooler"}, "backup-store": set(), "custodian": set()}[service]
    assert {role for role in ROLE_NAMES if SECRETS.passwords[role] in whole} == needed
    store_keys = {key for key, secret in SECRETS.store_secrets.items() if secret in whole}
    assert (
        store_keys
        == {
            "postgres": {"pgbackrest"},
            "pgbouncer": set(),
            "backup-store": {"root", "custodian", "pgbackrest"},
            "custodian": {"custodian"},
        }[service]
    )
    assert SECRETS.authority.key not in whole


OFFSITE = Settings(offsite_endpoint="https://copy.example.org", offsite_bucket="copies", offsite_interval_minutes=7)


def custodian_texts(settings: Settings) -> dict[str, str]:
    files = custodian.custodian_files(settings, "dev", SECRETS, ("access", "hunter2"))  # pragma: allowlist secret
    return {file.path: file.content for file in files}


def test_the_custodian_copies_only_where_there_is_an_off_site_place() -> None:
    without, with_copy = custodian_texts(Settings()), custodian_texts(OFFSITE)
    assert [line.split()[-1] for line in without["custodian/crontab"].splitlines()[1:]] == ["purge"]
    assert with_copy["custodian/crontab"].splitlines()[2].startswith("*/7 * * * * ")
    assert json.loads(without["custodian/config.json"])["offsite"] is None
    assert "hunter2" not in "".join(without.values())
    assert json.loads(with_copy["secrets/custodian.json"])["offsite"] == ["access", "hunter2"]


def test_the_off_site_copy_lies_in_a_folder_of_the_stack() -> None:
    assert json.loads(custodian_texts(OFFSITE)["custodian/config.json"])["offsite"]["folder"] == "dev/"
    named = OFFSITE.model_copy(update={"offsite_folder": "a/b"})
    assert json.loads(custodian_texts(named)["custodian/config.json"])["offsite"]["folder"] == "a/b/"


def test_a_private_ca_of_the_off_site_service_reaches_the_custodian() -> None:
    assert "tls/offsite-ca.crt" not in custodian_texts(OFFSITE)
    private = OFFSITE.model_copy(update={"offsite_ca_certificate": "PEM"})
    assert custodian_texts(private)["tls/offsite-ca.crt"] == "PEM\n"


def test_modes_are_those_that_the_servers_accept() -> None:
    assert ServerFile("x", "", is_secret=True).mode == "0400"
