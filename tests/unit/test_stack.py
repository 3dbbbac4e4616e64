"""What a stack tells about itself, and how it is made: outputs, URIs, inventory, secrets, `init`."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from memharbor.errors import ConfigError, ExternalToolError, StateRefusedError
from memharbor.output import Output
from memharbor.settings import Settings
from memharbor.stack import (
    StackOutputs,
    build_inventory,
    dsn,
    environment,
    find_leader,
    init,
    provisioner,
    read_outputs,
)
from memharbor.stack import outputs as stack_outputs
from memharbor.stack.certificates import LEAF_DAYS, RENEWAL_DAYS, certificate_names, find_expiry
from memharbor.stack.config import OFFSITE_KEYS, SECRETS_KEY, check_stack_name, offsite_key
from memharbor.stack.init import destroy_stack, init_stack
from memharbor.stack.secrets import (
    ROLE_NAMES,
    certificate_nodes,
    check_public_names,
    complete_secrets,
    parse_secrets,
)


def endpoint(port: int, dbname: str = "memharbor", host: str = "127.0.0.1") -> dict[str, Any]:
    return {"host": host, "port": port, "dbname": dbname}


def raw_outputs(**changes: Any) -> dict[str, Any]:
    return {
        "stack": "dev",
        "topology": "single",
        "stanza": "main",
        "database": "memharbor",
        "settings": Settings().model_dump(),
        "nodes": [
            {
                "index": 0,
                "name": "postgres-0",
                "host": "dev-postgres-0",
                "container": "dev-postgres-0",
                "volume": "dev-postgres-0",
                "files_volume": "dev-postgres-0-files-0",
                "address": "postgres-0:5432",
                "roles": ["primary"],
            }
        ],
        "endpoints": {
            "rw": endpoint(15432),
            "ro": endpoint(15433),
            "pool": endpoint(6432),
            "pool_ro": endpoint(6432, "memharbor_ro"),
            "pool_session": endpoint(6432, "memharbor_session"),
        },
        "containers": {"pgbouncer": ["dev-pgbouncer-0"], "backup_store": ["dev-backup-store-0"]},
        "store": {
            "bucket": "b",
            "repository_path": "/pgbackrest/dev",
            "endpoint": "backup-store:7070",
            "region": "us-east-1",
            "volume": "dev-backup-store-0",
        },
        "images": {"postgres": "sha256:1"},
        "network": "dev",
        "ca_certificate": "-----BEGIN CERTIFICATE-----\n",
        "passwords": {role: f"password of {role}" for role in ROLE_NAMES},
        **changes,
    }


FAKE_PULUMI = """#!{python}
import json, os, pathlib, sys
home = pathlib.Path(os.environ["FAKE_PULUMI_HOME"])
arguments = [argument for argument in sys.argv[1:] if argument != "--non-interactive"]
with open(home / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
state = home / "state.json"
stacks = json.loads(state.read_text()) if state.exists() else {{}}
name = arguments[arguments.index("--stack") + 1] if "--stack" in arguments else None
def save():
    state.write_text(json.dumps(stacks, sort_keys=True))
match arguments[:2]:
    case ["stack", "ls"]:
        print(json.dumps([{{"name": stack}} for stack in stacks]))
    case ["stack", "init"]:
        stacks[name] = {{}}
        save()
    case ["stack", "output"]:
        if name not in stacks:
            sys.exit(f"error: no stack named '{{name}}' found")
        print((home / "outputs.json").read_text() if (home / "outputs.json").exists() else "{{}}")
    case ["config", "--json"]:
        print(json.dumps({{key: {{"value": value}} for key, value in stacks[name].items()}}))
    case ["config", "set-all"]:
        for pair in arguments[arguments.index("--plaintext"):]:
            if pair != "--plaintext":
                key, _, value = pair.partition("=")
                stacks[name][key] = value
        save()
    case ["config", "set"]:
        assert "--secret" in arguments
        stacks[name][arguments[-1]] = sys.stdin.read()
        save()
    case _:
        sys.exit(f"error: the fake does not know {{arguments}}")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of its own, with a Pulumi that keeps its state in a file."""
    (tmp_path / "infra").mkdir()
    (tmp_path / "Pulumi.yaml").write_text("name: memharbor\n")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "pulumi").write_text(FAKE_PULUMI.format(python=sys.executable))
    (binaries / "pulumi").chmod(0o755)
    monkeypatch.setenv("FAKE_PULUMI_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    read_outputs.cache_clear()
    yield tmp_path
    read_outputs.cache_clear()


@pytest.fixture
def outputs(checkout: Path) -> StackOutputs:
    return StackOutputs.model_validate(raw_outputs())


def put_outputs(checkout: Path, raw: dict[str, Any]) -> None:
    (checkout / "state.json").write_text(json.dumps({raw.get("stack", "dev"): {}}))
    (checkout / "outputs.json").write_text(json.dumps(raw))


# --- outputs


def test_outputs_are_read_and_the_ca_certificate_is_put_where_clients_look(checkout: Path) -> None:
    put_outputs(checkout, raw_outputs())
    read = read_outputs("dev")
    assert find_leader(read).container == "dev-postgres-0"
    path = checkout / ".memharbor" / "dev" / "ca.crt"
    assert path.read_text() == read.ca_certificate
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_stack_that_is_not_up_names_the_next_command(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="`dev` is not up") as caught:
        read_outputs("dev")
    assert "memharbor stack init --stack dev" in caught.value.hints[0]


def test_a_stack_without_outputs_is_not_up(checkout: Path) -> None:
    (checkout / "state.json").write_text(json.dumps({"dev": {}}))
    with pytest.raises(ConfigError, match="is not up"):
        read_outputs("dev")


def test_outputs_of_another_version_are_refused_without_quoting_them(checkout: Path) -> None:
    raw = raw_outputs(passwords={"app": ["hunter2"]}, surplus=1)
    del raw["nodes"]
    put_outputs(checkout, raw)
    with pytest.raises(ConfigError, match="another version") as caught:
        read_outputs("dev")
    for name in ("nodes", "surplus", "passwords"):
        assert name in caught.value.message
    assert "hunter2" not in caught.value.message
    assert caught.value.__cause__ is None


def test_another_failure_of_pulumi_is_passed_on(checkout: Path) -> None:
    with pytest.raises(ExternalToolError, match="the fake does not know"):
        provisioner.pulumi(["whoami"])


@pytest.mark.parametrize(
    ("said", "hinted"),
    [
        ("incorrect passphrase", "source .venv/bin/activate"),
        ("passphrase must be set with PULUMI_CONFIG_PASSPHRASE", "source .venv/bin/activate"),
        ('unable to open state directory "file:///gone": stat /gone: no such file or directory', "make setup"),
    ],
)
def test_what_pulumi_needs_of_the_environment_is_hinted_at(checkout: Path, said: str, hinted: str) -> None:
    (checkout / "bin" / "pulumi").write_text(f"#!/bin/sh\necho 'error: {said}' >&2\nexit 255\n")
    with pytest.raises(ExternalToolError, match="error: ") as caught:
        provisioner.read_stack_outputs("dev")
    assert any(hinted in hint for hint in caught.value.hints)


def test_a_secret_that_pulumi_refuses_is_not_in_the_error(checkout: Path) -> None:
    (checkout / "bin" / "pulumi").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 255\n")
    with pytest.raises(ExternalToolError, match="error: no") as caught:
        provisioner.set_secret("dev", SECRETS_KEY, "hunter2")
    assert "hunter2" not in str(caught.value)


def test_passwords_do_not_appear_where_outputs_are_shown(outputs: StackOutputs) -> None:
    assert "password of" not in repr(outputs)


def test_a_stack_is_only_handled_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        provisioner, "__file__", str(tmp_path / "site-packages" / "memharbor" / "stack" / "provisioner.py")
    )
    with pytest.raises(ConfigError, match="checkout") as caught:
        provisioner.find_checkout()
    assert "MEMHARBOR_DSN" in caught.value.hints[0]


# --- connection URIs


@pytest.mark.parametrize(
    ("options", "port", "dbname"),
    [
        ({}, 6432, "memharbor"),
        ({"read_only": True}, 6432, "memharbor_ro"),
        ({"session": True}, 6432, "memharbor_session"),
        ({"direct": True}, 15432, "memharbor"),
        ({"direct": True, "read_only": True}, 15433, "memharbor"),
    ],
)
def test_a_dsn_leads_where_it_was_asked_to(
    outputs: StackOutputs, options: dict[str, bool], port: int, dbname: str
) -> None:
    parts = conninfo_to_dict(dsn(outputs, "app", **options))
    assert (parts["host"], parts["port"], parts["dbname"]) == ("127.0.0.1", str(port), dbname)
    assert (parts["user"], parts["password"]) == ("memharbor_app", "password of app")
    assert parts["sslmode"] == "verify-full"


def test_the_administrator_is_the_superuser_and_goes_straight_to_the_server(outputs: StackOutputs) -> None:
    parts = conninfo_to_dict(dsn(outputs, "admin"))
    assert (parts["user"], parts["port"]) == ("postgres", "15432")


def test_a_role_that_does_not_exist_is_refused_with_those_that_do(outputs: StackOutputs) -> None:
    with pytest.raises(ConfigError, match="no role `root`") as caught:
        dsn(outputs, "root")
    assert "readonly" in caught.value.hints[0]


@given(
    password=st.text(min_size=1).filter(lambda text: "\0" not in text),
    dbname=st.from_regex(r"[a-z_][a-z0-9_]{0,20}", fullmatch=True),
    host=st.sampled_from(["127.0.0.1", "::1", "db.example"]),
)
def test_every_dsn_says_exactly_what_went_in(password: str, dbname: str, host: str) -> None:
    try:
        password.encode()
    except UnicodeEncodeError:
        return
    raw = raw_outputs()
    raw["endpoints"]["pool"] = endpoint(6432, dbname, host)
    raw["passwords"]["app"] = password
    parts = conninfo_to_dict(dsn(StackOutputs.model_validate(raw), "app"))
    assert (parts["password"], parts["dbname"], parts["host"]) == (password, dbname, host)
    assert parts["sslrootcert"].endswith("/.memharbor/dev/ca.crt")


def test_the_environment_is_what_programs_connect_with(outputs: StackOutputs, checkout: Path) -> None:
    variables = environment(outputs)
    assert variables["PGUSER"] == "memharbor_app"
    assert variables["PGSSLMODE"] == "verify-full"
    assert variables["PGSSLROOTCERT"] == str(checkout / ".memharbor" / "dev" / "ca.crt")
    assert variables["MEMHARBOR_STACK"] == "dev"
    for role in ("app", "service", "readonly"):
        assert conninfo_to_dict(variables[f"MEMHARBOR_{role.upper()}_DSN"])["user"] == f"memharbor_{role}"
    assert "MEMHARBOR_DSN" not in variables, "it would make a stack of ours look like a foreign database"
    assert not any("postgres:" in value for value in variables.values()), "no administrator"


# --- inventory


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if set(value) == {"__ansible_unsafe"}:
            return
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def test_the_inventory_has_one_host_with_every_setting() -> None:
    variables = build_inventory(Settings(embedding_dims=384), stack="dev")["_meta"]["hostvars"]["memharbor"]
    assert {f"memharbor_{name}" for name in Settings.model_fields} <= set(variables)
    assert variables["memharbor_embedding_dims"] == 384
    assert variables["memharbor_leakproof"] is True
    assert list(strings(variables)) == [], "every text is marked unsafe"


# --- secrets


def test_secrets_are_generated_once_and_completed_later() -> None:
    first = complete_secrets("dev", ["postgres-0"])
    assert complete_secrets("dev", ["postgres-0"], first) is first
    more = complete_secrets("dev", ["postgres-0", "postgres-1"], first)
    assert more.certificates["postgres-0"] == first.certificates["postgres-0"]
    assert more.authority == first.authority
    assert more.passwords == first.passwords
    assert set(more.certificates) == {"postgres-0", "postgres-1"}


def test_a_role_that_is_new_gets_a_password_and_the_others_keep_theirs() -> None:
    full = complete_secrets("dev", [])
    old = full.model_copy(update={"passwords": {"app": full.passwords["app"]}})
    completed = complete_secrets("dev", [], old)
    assert set(completed.passwords) == set(ROLE_NAMES)
    assert completed.passwords["app"] == full.passwords["app"]


def test_a_leaf_certificate_that_soon_expires_is_renewed_under_the_same_authority() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    old = complete_secrets("dev", ["postgres-0"], now=now - timedelta(days=LEAF_DAYS - RENEWAL_DAYS + 1))
    fresh = complete_secrets("dev", ["postgres-0"], old, now=now)
    assert find_expiry(fresh.certificates["postgres-0"].certificate) == now + timedelta(days=LEAF_DAYS)
    assert (fresh.authority, fresh.passwords) == (old.authority, old.passwords)
    assert complete_secrets("dev", ["postgres-0"], fresh, now=now) is fresh


def test_other_public_names_make_new_certificates_for_what_is_published_only() -> None:
    nodes, names = certificate_nodes(Settings()), ("db.example.org", "2001:db8::1")
    old = complete_secrets("dev", nodes)
    check_public_names("dev", old, ())
    with pytest.raises(ConfigError, match=r"not valid for `2001:db8::1`, `db.example.org`"):
        check_public_names("dev", old, names)
    fresh = complete_secrets("dev", nodes, old, public_names=names)
    check_public_names("dev", fresh, names)
    assert set(names) < set(certificate_names(fresh.certificates["pgbouncer-0"].certificate))
    assert fresh.certificates["backup-store-0"] == old.certificates["backup-store-0"]
    assert fresh.authority == old.authority
    assert complete_secrets("dev", nodes, fresh, public_names=names) is fresh
    # Names that were taken back are in no certificate any more.
    again = complete_secrets("dev", nodes, fresh)
    assert not set(names) & set(certificate_names(again.certificates["pgbouncer-0"].certificate))


def test_secrets_are_long_different_and_need_no_quoting() -> None:
    made = complete_secrets("dev", [])
    values = [*made.passwords.values(), *made.store_secrets.values(), made.repository_passphrase]
    assert len(set(values)) == len(values)
    for value in values:
        assert len(value) >= 43
        assert value.replace("-", "").replace("_", "").isalnum()


def test_secrets_survive_a_round_trip_and_do_not_show() -> None:
    made = complete_secrets("dev", certificate_nodes(Settings()))
    assert parse_secrets(made.model_dump_json()) == made
    for value in (made.passwords["app"], made.authority.key, made.repository_passphrase):
        assert value not in repr(made)


@pytest.mark.parametrize("text", ["", "[]", '{"passwords": "hunter2"}'])  # pragma: allowlist secret
def test_damaged_secrets_are_refused_without_quoting_them(text: str) -> None:
    with pytest.raises(ConfigError, match="memharbor:secrets") as caught:
        parse_secrets(text)
    assert "hunter2" not in caught.value.message
    assert caught.value.__cause__ is None


# --- init


def calls(checkout: Path) -> list[list[str]]:
    path = checkout / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_init_makes_a_stack_with_settings_secrets_and_the_ca_file(checkout: Path) -> None:
    report = init_stack("dev", {"embedding_dims": "384"})
    config = json.loads((checkout / "state.json").read_text())["dev"]
    assert config["memharbor:embedding_dims"] == "384"
    made = parse_secrets(config[SECRETS_KEY])
    assert set(made.certificates) == {"postgres-0", "pgbouncer-0", "backup-store-0"}
    assert report.ca_certificate.read_text() == made.authority.certificate
    assert report.as_data()["changed"] is True
    assert report.text == "stack dev: created; secrets and certificates generated; set embedding_dims"


def test_init_again_changes_not_a_byte(checkout: Path) -> None:
    init_stack("dev", {"embedding_dims": "384"})
    before = (checkout / "state.json").read_bytes()
    reading = {("stack", "ls"), ("config", "--json")}
    (checkout / "calls").unlink()
    report = init_stack("dev", {"embedding_dims": "384"})
    assert (checkout / "state.json").read_bytes() == before
    assert {tuple(call[:2]) for call in calls(checkout)} == reading
    assert report.text == "stack dev: nothing to do"


def test_init_keeps_the_config_of_a_stack_that_exists_and_says_how_to_change_it(checkout: Path) -> None:
    init_stack("dev", {"embedding_dims": "384", "leakproof": "true"})
    before = (checkout / "state.json").read_bytes()
    report = init_stack("dev", {"embedding_dims": "768", "leakproof": "1", "pool_port": "6432"})
    assert (checkout / "state.json").read_bytes() == before
    assert report.changed is False
    # `1` is `true`, and 6432 is the default that the stack has.
    assert report.kept_settings == {"embedding_dims": "pulumi config set embedding_dims 768 --stack dev"}
    assert report.notes == [
        "MEMHARBOR_EMBEDDING_DIMS differs from the config of stack dev, which was kept; to change it:"
        " pulumi config set embedding_dims 768 --stack dev"
    ]


def test_init_refuses_a_wrong_setting_of_a_stack_that_exists(checkout: Path) -> None:
    init_stack("dev", {})
    with pytest.raises(ConfigError, match="pool_port"):
        init_stack("dev", {"pool_port": "1"})


def test_a_dry_run_of_init_says_what_it_would_do_and_does_nothing(checkout: Path) -> None:
    report = init_stack("dev", {"pool_port": "7000"}, dry_run=True)
    assert report.text == "stack dev: would be created; secrets and certificates generated; set pool_port"
    assert {tuple(call[:2]) for call in calls(checkout)} == {("stack", "ls")}
    assert not (checkout / ".memharbor").exists()


def test_init_writes_an_escrow_file_and_says_once_to_keep_it_elsewhere(checkout: Path) -> None:
    report = init_stack("dev", {})
    assert any("keep a copy of" in note and str(report.escrow) in note for note in report.notes)
    assert stat.S_IMODE(report.escrow.stat().st_mode) == 0o600
    assert init_stack("dev", {}).notes == []


def test_init_from_an_escrow_file_takes_its_secrets_and_settings(checkout: Path) -> None:
    kept = checkout / "kept.json"
    kept.write_bytes(init_stack("dev", {"embedding_dims": "384"}).escrow.read_bytes())
    made = json.loads((checkout / "state.json").read_text())["dev"]
    (checkout / "state.json").unlink()
    report = init_stack("dev", {}, escrow_file=kept)
    config = json.loads((checkout / "state.json").read_text())["dev"]
    assert parse_secrets(config[SECRETS_KEY]) == parse_secrets(made[SECRETS_KEY])
    assert config["memharbor:embedding_dims"] == "384"
    assert report.notes == []
    assert "secrets of the escrow file taken" in report.text


def test_the_key_of_the_offsite_copy_is_in_the_escrow_file_and_comes_back_from_it(checkout: Path) -> None:
    init_stack("dev", {})
    for key, value in zip(OFFSITE_KEYS, ("offsite-id", "offsite-value"), strict=True):
        provisioner.set_secret("dev", key, value)
    report = init_stack("dev", {})
    assert any("keep a copy of" in note for note in report.notes), "the copy that was kept lacks the key"
    assert init_stack("dev", {}).notes == []
    kept = checkout / "kept.json"
    kept.write_bytes(report.escrow.read_bytes())
    (checkout / "state.json").unlink()
    init_stack("dev", {}, escrow_file=kept)
    assert offsite_key(provisioner.read_config("dev")) == ("offsite-id", "offsite-value")
    assert "offsite-value" not in json.dumps(calls(checkout))


def test_init_never_replaces_secrets_by_those_of_an_escrow_file(checkout: Path) -> None:
    kept = checkout / "kept.json"
    kept.write_bytes(init_stack("dev", {}).escrow.read_bytes())
    assert init_stack("dev", {}, escrow_file=kept).changed is False
    (checkout / "state.json").unlink()
    init_stack("dev", {})
    before = (checkout / "state.json").read_bytes()
    with pytest.raises(StateRefusedError, match="other secrets"):
        init_stack("dev", {}, escrow_file=kept)
    assert (checkout / "state.json").read_bytes() == before


def test_no_secret_is_an_argument(checkout: Path) -> None:
    init_stack("dev", {})
    made = parse_secrets(json.loads((checkout / "state.json").read_text())["dev"][SECRETS_KEY])
    arguments = json.dumps(calls(checkout))
    assert made.passwords["app"] not in arguments
    assert "PRIVATE" not in arguments


def test_a_wrong_setting_makes_no_stack(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="pool_port"):
        init_stack("dev", {"pool_port": "1"})
    assert not (checkout / "state.json").exists()


class EmptyEngine:
    """An engine that has nothing of a stack."""

    def __init__(self, stack: str) -> None:
        self.stack = stack

    def names(self) -> list[str]:
        return []


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("stacks", "said"),
    [(["prod", "dev"], "there is no stack `dve`, .*; there are `dev`, `prod`$"), ([], "; there is none$")],
)
def test_destroying_a_stack_that_is_none_is_refused_with_those_that_there_are(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, stacks: list[str], said: str, dry_run: bool
) -> None:
    (checkout / "state.json").write_text(json.dumps({name: {} for name in stacks}))
    monkeypatch.setattr(init, "StackResources", EmptyEngine)
    with pytest.raises(ConfigError, match=said) as caught:
        destroy_stack("dve", Output(), dry_run=dry_run)
    assert len(caught.value.hints) == 1
    assert {tuple(call[:2]) for call in calls(checkout)} == {("stack", "ls")}


@pytest.mark.parametrize("name", ["", "Dev", "1dev", "dev_1", "a" * 32, "dev;rm", "-dev"])
def test_a_name_that_containers_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a stack's name"):
        check_stack_name(name)


def test_a_stack_is_named_by_the_environment_or_the_default() -> None:
    assert stack_outputs.stack_name({"MEMHARBOR_STACK": "prod"}) == "prod"
    assert stack_outputs.stack_name({"MEMHARBOR_STACK": ""}) == stack_outputs.DEFAULT_STACK


def test_what_activation_sets_is_there_without_it_and_what_a_user_set_wins() -> None:
    bare = provisioner.activated({"PATH": "/bin"}, Path("/co"), Path("/co/.venv/bin"))
    assert bare["PATH"] == f"/co/.venv/bin{os.pathsep}/bin"
    assert bare["PULUMI_CONFIG_PASSPHRASE_FILE"] == "/co/.memharbor/passphrase"
    own = {"PATH": "/co/.venv/bin", "PULUMI_BACKEND_URL": "s3://b", "PULUMI_CONFIG_PASSPHRASE": "x"}
    kept = provisioner.activated(own, Path("/co"), Path("/co/.venv/bin"))
    assert kept["PATH"] == "/co/.venv/bin"
    assert kept["PULUMI_BACKEND_URL"] == "s3://b"
    assert "PULUMI_CONFIG_PASSPHRASE_FILE" not in kept


def test_passwords_of_outputs_are_secret_strings(outputs: StackOutputs) -> None:
    assert isinstance(outputs.passwords["app"], SecretStr)
