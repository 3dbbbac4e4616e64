"""Which database is meant and how it is reached, without a word too much about its passwords."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from memharbor.errors import ConfigError
from memharbor.settings import Settings, load_settings
from memharbor.target import find_target, name_origins, spell_uri
from memharbor.validation import ValidationContext

URI = "postgresql://admin:hunter2@db.example:5433/memories?sslmode=verify-full"  # pragma: allowlist secret
ENVIRON = {"MEMHARBOR_APP_PASSWORD": "p@ss/w'rd", "MEMHARBOR_SERVICE_PASSWORD": "x"}  # pragma: allowlist secret
text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


def test_a_role_of_a_foreign_database_has_a_uri() -> None:
    uri = find_target("dev", URI, environ=ENVIRON).dsn("app")
    expected = "postgresql://memharbor_app:p%40ss%2Fw%27rd@db.example:5433/memories"  # pragma: allowlist secret
    assert uri == f"{expected}?sslmode=verify-full"


def test_an_administrator_who_was_given_as_key_and_value_has_a_uri_too() -> None:
    target = find_target("dev", "host=/run/postgresql dbname=memories user=me options='-c a=b c'", environ={})
    uri = target.dsn("admin")
    assert uri.startswith("postgresql://me@/memories?")
    assert conninfo_to_dict(uri) == {
        "host": "/run/postgresql", "dbname": "memories", "user": "me", "options": "-c a=b c",
    }  # fmt: skip


@given(
    parts=st.fixed_dictionaries(
        {
            "user": text,
            "password": text,
            "dbname": text,
            "host": st.sampled_from(["db", "::1", "fe80::1%eth0", "/run/pg", "a,b", "10.0.0.1"]),
        },
        optional={"sslrootcert": text, "options": text, "application_name": text},
    )
)
def test_every_uri_says_exactly_what_went_in(parts: dict[str, str]) -> None:
    assert conninfo_to_dict(spell_uri(parts)) == parts


@pytest.mark.parametrize("dsn", ["postgresql://me:pa ss%wordpiece@x/y", "host=x password='wordpiece"])
def test_a_dsn_that_cannot_be_read_is_refused_without_a_piece_of_it(dsn: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        find_target("dev", dsn, environ=ENVIRON)
    assert "wordpiece" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_passwords_do_not_appear_where_targets_are_shown() -> None:
    target = find_target("dev", URI, environ=ENVIRON)
    context = ValidationContext(Settings(), URI, target.dsn("app"), target.dsn("service"), is_pooled=False)
    for shown in (repr(target), repr(context)):
        assert "hunter2" not in shown
        assert "ss/w" not in shown
        assert "ss%2Fw" not in shown


def test_the_origin_of_a_deployed_setting_is_its_config_or_the_default() -> None:
    deployed, origins = load_settings(
        ("environment", {"hnsw_m": "8"}),
        ("stack dev", Settings(embedding_dims=384, pool_size=20, pool_port=7000).model_dump()),
    )
    config = {"embedding_dims": "384", "pool_size": "30"}
    named = name_origins("dev", deployed, origins, config)
    assert named["hnsw_m"] == "environment"
    assert named["embedding_dims"] == "config of stack dev"
    assert named["leakproof"] == "default"
    assert named["pool_size"] == "stack dev as deployed, the next `pulumi up` sets 30"
    assert named["pool_port"] == "stack dev as deployed, the next `pulumi up` sets 6432"
    assert set(named) == set(Settings.model_fields)


def test_a_config_that_is_wrong_leaves_the_origins_as_the_outputs_tell_them() -> None:
    deployed, origins = load_settings(("stack dev", Settings().model_dump()))
    assert name_origins("dev", deployed, origins, {"pool_port": "x"}) == origins
