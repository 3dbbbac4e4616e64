"""Settings: merged by strength, refused all at once, derived once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memharbor.errors import ConfigError
from memharbor.settings import (
    EMBEDDING_DIMS_MAX,
    RESERVED_CONNECTIONS,
    Settings,
    load_settings,
    setting_fields,
    settings_from_environment,
)


def test_the_strongest_layer_decides_and_is_named() -> None:
    settings, origins = load_settings(
        ("option", {"pool_size": 5}), ("environment", {"pool_size": "6", "hnsw_m": "8"}), ("stack dev", {"hnsw_m": 9})
    )
    assert (settings.pool_size, settings.hnsw_m, settings.leakproof) == (5, 8, True)
    assert (origins["pool_size"], origins["hnsw_m"], origins["leakproof"]) == ("option", "environment", "default")


def test_all_problems_are_reported_at_once_with_their_origin() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(
            ("option", {"embedding_dims": 0}),
            ("stack dev", {"nonsense": 1, "topology": "ring", "pool_port": 15432, "postgres_port": 15432}),
        )
    message = caught.value.message
    for part in (
        "4 wrong settings",
        "embedding_dims: ",
        "(from option)",
        "nonsense: unknown setting",
        "topology: ",
        "pool_port: must differ",
    ):
        assert part in message, message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hnsw_ef_construction": 20}, "at least twice hnsw_m"),
        ({"postgres_memory_mb": 512, "maintenance_work_mem_mb": 500}, "maintenance_work_mem_mb"),
        ({"max_connections": 30}, "max_connections"),
        ({"database": "Robert'); --"}, "database"),
        ({"bind_address": "example.org"}, "bind_address"),
        ({"postgres_port": 80}, "postgres_port"),
        ({"bind_address": "0.0.0.0"}, "public_names: must name"),
        ({"public_names": "db.example.org, not_a_name,*.x,0.0.0.0"}, "`not_a_name`.*\n.*`\\*.x`.*\n.*`0.0.0.0`"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(("test", wrong))


def test_the_pools_leave_the_connections_that_are_reserved() -> None:
    Settings(max_connections=30 + RESERVED_CONNECTIONS)
    with pytest.raises(ValidationError, match="max_connections"):
        Settings(max_connections=30 + RESERVED_CONNECTIONS - 1)


def test_public_names_are_spelled_as_certificates_spell_them() -> None:
    settings = Settings(bind_address="::", public_names=" DB.example.org,192.0.2.10 ,,2001:DB8:0::1,db.example.org")
    assert settings.public_name_list == ("db.example.org", "192.0.2.10", "2001:db8::1")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().pool_size = 3  # type: ignore[misc]


@given(st.integers(1, EMBEDDING_DIMS_MAX))
def test_every_number_of_dims_has_a_type_that_can_be_indexed_and_stored(dims: int) -> None:
    settings = Settings(embedding_dims=dims)
    assert settings.embedding_type == ("vector" if dims <= 1900 else "halfvec")
    row_bytes = dims * (4 if settings.embedding_type == "vector" else 2)
    assert settings.embedding_storage == "external" or row_bytes <= 7600
    assert dims <= (2000 if settings.embedding_type == "vector" else 4000)
    assert settings.embedding_operator_class.startswith(settings.embedding_type)


def test_shared_memory_holds_a_whole_index_build() -> None:
    settings = Settings(postgres_memory_mb=8192, maintenance_work_mem_mb=2048)
    assert settings.shm_size_mb > settings.maintenance_work_mem_mb


def test_only_known_variables_are_settings() -> None:
    environ = {"MEMHARBOR_POOL_SIZE": "7", "MEMHARBOR_STACK": "x", "MEMHARBOR_DSN": "y", "POOL_SIZE": "8"}
    assert settings_from_environment(environ) == {"pool_size": "7"}


def test_every_setting_is_documented_with_an_example() -> None:
    for name, field in setting_fields().items():
        assert str(field.description).endswith("."), name
        assert field.examples, name
        load_settings(
            ("example", {name: field.examples[0], **({"pool_port": 6433} if name == "postgres_port" else {})})
        )
