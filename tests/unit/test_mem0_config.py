from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor import versions
from memharbor.commands.config import config as config_group
from memharbor.embedder import ANY_KEY
from memharbor.errors import ConfigError, SourceDataError, UsageError
from memharbor.mem0_config import checking, rules
from memharbor.mem0_config.convert import Converted, convert
from memharbor.mem0_config.for_stack import choose_model, for_server, for_service, for_users
from memharbor.mem0_config.reading import read_configuration
from memharbor.mem0_config.render import as_data, as_json, as_program
from memharbor.mem0_config.secrets import replace_secrets
from memharbor.mem0_config.values import Text, Variable, with_references
from tests.old_mem0 import OLD_RELEASES, environment

DIMS = 32
SECRET = "hunter2-Very/Secret"  # pragma: allowlist secret
KEY_OF_OPENAI = "sk-abcdefghijklmnop1234"  # pragma: allowlist secret
DSN = "postgresql://memharbor_service:p%40ss@db.example.org:6432/memories?sslmode=verify-full&sslrootcert=/ca.crt"  # pragma: allowlist secret


def old_store(**config: Any) -> dict[str, Any]:
    place = {"user": "me", "password": Text((Variable("PW"),)), "host": "h", "port": 5432}
    return {"provider": "pgvector", "config": {**place, **config}}


def notes_of(converted: Converted, kind: str) -> list[str]:
    return [note.key for note in converted.notes if note.kind == kind]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_key_of_an_old_configuration_is_kept_renamed_or_named_as_dropped() -> None:
    converted = convert(
        {
            "vector_store": old_store(collection_name="MyMem", nonsense=1),
            "graph_store": {"provider": "neo4j", "config": {"password": SECRET}},
            "enable_graph": True,
            "custom_update_memory_prompt": "merge them",
            "custom_fact_extraction_prompt": "only food",
            "llm": {"provider": "openai", "config": {"model": "gpt-4o", "nonsense": 1}, "extra": 1},
            "embedder": "openai",
            "history_db_path": "h.db",
            "version": "v1.0",
            "unheard": 1,
        },
        "0.1",
    )
    assert notes_of(converted, "dropped") == [
        "graph_store",
        "enable_graph",
        "custom_update_memory_prompt",
        "unheard",
        "vector_store.config.nonsense",
        "llm.extra",
        "llm.config.nonsense",
    ]
    assert notes_of(converted, "renamed") == ["custom_fact_extraction_prompt"]
    assert notes_of(converted, "changed") == ["version", "vector_store.config.collection_name", "embedder"]
    assert as_data(converted.config) == {
        "vector_store": {
            "provider": "pgvector",
            "config": {
                "user": "me",
                "password": "${PW}",
                "host": "h",
                "port": 5432,
                "collection_name": "mymem",
                "embedding_model_dims": 1536,
            },
        },
        "llm": {"provider": "openai", "config": {"model": "gpt-4o"}},
        "embedder": {"provider": "openai", "config": {"model": "text-embedding-3-small", "embedding_dims": 1536}},
        "history_db_path": "h.db",
        "custom_instructions": "only food",
        "version": "v1.1",
    }
    assert converted.checked_by == versions.MEM0AI


@pytest.mark.parametrize(("release", "model"), [("0.1", "gpt-4o-mini"), ("1.0", "gpt-4.1-nano-2025-04-14")])
def test_models_and_dimensions_that_were_defaults_are_pinned(release: Any, model: str) -> None:
    converted = convert({"vector_store": {"provider": "qdrant", "config": {"path": "q"}}}, release)
    assert converted.config["llm"] == {"provider": "openai", "config": {"model": model}}
    assert converted.config["embedder"]["config"] == {"model": "text-embedding-3-small", "embedding_dims": 1536}
    assert converted.config["vector_store"]["config"]["embedding_model_dims"] == 1536
    assert set(notes_of(converted, "pinned")) == {
        "llm.provider",
        "llm.config.model",
        "embedder.provider",
        "embedder.config.model",
        "embedder.config.embedding_dims",
        "vector_store.config.embedding_model_dims",
    }


def test_0_1_asked_every_model_of_openai_for_1536_dimensions_and_1_0_did_not() -> None:
    old = {
        "vector_store": old_store(),
        "embedder": {"provider": "openai", "config": {"model": "text-embedding-3-large"}},
    }
    assert convert(old, "0.1").config["embedder"]["config"]["embedding_dims"] == 1536
    told = [note.text for note in convert(old).notes if note.key == "embedder.config.embedding_dims"]
    assert "--from 1.0" in told[0]
    wide = convert(old, "1.0").config
    assert wide["embedder"]["config"]["embedding_dims"] == 3072
    assert wide["vector_store"]["config"]["embedding_model_dims"] == 3072
    assert wide["vector_store"]["config"]["hnsw"] is False


def test_an_endpoint_that_takes_no_dimensions_is_asked_for_none() -> None:
    embedder = {"provider": "openai", "config": {"model": "voyage-3", "openai_base_url": "http://h/v1"}}
    converted = convert({"vector_store": old_store(embedding_model_dims=1024), "embedder": embedder}, "1.0")
    assert "embedding_dims" not in converted.config["embedder"]["config"]
    assert converted.config["vector_store"]["config"]["embedding_model_dims"] == 1024


def test_dimensions_that_do_not_meet_are_said() -> None:
    embedder = {"provider": "ollama", "config": {"model": "nomic-embed-text"}}
    converted = convert({"vector_store": old_store(embedding_model_dims=512), "embedder": embedder})
    assert [note.text for note in converted.notes if note.key.endswith("embedding_model_dims")] == [
        "the store is made for 512 dimensions, and the embedder gives 768"
    ]


def test_the_release_is_told_by_what_only_one_of_them_had() -> None:
    store = old_store()
    assert convert({"vector_store": store}).release == "0.1"
    assert convert({"vector_store": store, "reranker": {"provider": "cohere"}}).release == "1.0"
    assert convert({"vector_store": store, "embedder": "fastembed"}).release == "1.0"
    pinned = [note.text for note in convert({"vector_store": store}).notes if note.key == "llm.config.model"]
    assert "--from 1.0" in pinned[0]


def test_the_provider_that_never_was_becomes_pgvector() -> None:
    config = {
        "url": f"postgresql+psycopg2://me:{SECRET}@h/db",
        "table_name": "Memories",
        "embedding_dimension": 384,
        "pool_size": 20,
        "max_overflow": 10,
    }
    converted = convert({"vector_store": {"provider": "postgres", "config": config}})
    assert as_data(converted.config["vector_store"]) == {
        "provider": "pgvector",
        "config": {
            "connection_string": "postgresql://me:${MEM0_VECTOR_STORE_PASSWORD}@h/db",
            "collection_name": "memories",
            "embedding_model_dims": 384,
            "maxconn": 20,
        },
    }
    assert notes_of(converted, "dropped") == ["vector_store.config.max_overflow"]


def test_a_collection_of_a_store_that_keeps_capitals_is_kept() -> None:
    store = {"provider": "qdrant", "config": {"collection_name": "MyMem", "path": "q"}}
    assert convert({"vector_store": store}).config["vector_store"]["config"]["collection_name"] == "MyMem"


def test_only_what_postgresql_folds_is_folded() -> None:
    converted = convert({"vector_store": old_store(collection_name="ÄMem")})
    assert converted.config["vector_store"]["config"]["collection_name"] == "Ämem"


def test_a_configuration_of_2_x_is_not_converted_again() -> None:
    with pytest.raises(SourceDataError, match=r"2\.x already"):
        convert({"vector_store": old_store(), "custom_instructions": "x"})


@pytest.mark.parametrize("component", [3, ["openai"], {"provider": 3}, {"provider": "openai", "config": "x"}])
def test_a_component_of_another_shape_is_refused(component: Any) -> None:
    with pytest.raises(SourceDataError, match="llm"):
        convert({"vector_store": old_store(), "llm": component})


def test_what_the_installed_mem0_refuses_is_an_error_without_values() -> None:
    with pytest.raises(SourceDataError, match=f"mem0ai {versions.MEM0AI} refuses") as caught:
        convert({"vector_store": {"provider": "nowhere", "config": {"api_key": SECRET}}})
    assert SECRET not in caught.value.message


def test_without_mem0_the_result_says_that_nobody_checked_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ImportError("No module named 'mem0'", name="mem0")

    monkeypatch.setattr(checking, "_installed", missing)
    converted = convert({"vector_store": old_store(nonsense=1)})
    assert converted.checked_by is None
    assert converted.notes[-1].text == "not checked against Mem0: mem0ai is not installed (mem0)"
    assert notes_of(converted, "dropped") == ["vector_store.config.nonsense"]
    monkeypatch.setattr(checking, "_installed", lambda: "1.0.11")
    assert "1.0.11 is installed" in convert({"vector_store": old_store()}).notes[-1].text


# Python, read and never run


PROGRAM = """
import os
from mem0 import Memory

raise SystemExit("this was run")
DIMS = 384
base = {"provider": "pgvector"}
config = {
    "vector_store": {
        **base,
        "config": {
            "connection_string": f"postgresql://{os.environ['PGUSER']}:{os.getenv('PGPASSWORD', 'hunter2')}@h/db",
            "collection_name": "Mem" + "ories",
            "embedding_model_dims": DIMS,
            "maxconn": int(os.getenv("POOL", "5")),
            "connection_pool": make_pool(),
        },
    },
    "llm": dict(provider="openai", config={"api_key": os.environ.get("OPENAI_API_KEY"), "temperature": -0.5}),
}
config["embedder"] = {"provider": "openai", "config": {"model": "text-embedding-3-small", "embedding_dims": DIMS}}
config["llm"]["config"]["model"] = "gpt-4o"


def build():
    return Memory.from_config(config_dict=config)
"""


def test_a_program_is_read_as_data(tmp_path: Path) -> None:
    converted = convert(read_configuration(write(tmp_path, "app.py", PROGRAM)))
    assert as_data(converted.config) == {
        "vector_store": {
            "provider": "pgvector",
            "config": {
                "connection_string": "postgresql://${PGUSER}:${PGPASSWORD}@h/db",
                "collection_name": "memories",
                "embedding_model_dims": 384,
                "maxconn": "${POOL}",
            },
        },
        "llm": {
            "provider": "openai",
            "config": {"api_key": "${OPENAI_API_KEY}", "temperature": -0.5, "model": "gpt-4o"},
        },
        "embedder": {"provider": "openai", "config": {"model": "text-embedding-3-small", "embedding_dims": 384}},
    }
    pool = next(note for note in converted.notes if note.key == "vector_store.config.connection_pool")
    assert "line 16" in pool.text
    program = as_program(converted.config)
    assert 'int(os.environ.get("POOL", "5"))' in program
    assert "hunter2" not in program + "".join(note.line() for note in converted.notes)


def test_a_program_that_is_written_runs_to_the_same_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert(read_configuration(write(tmp_path, "app.py", PROGRAM)))
    for name, value in {"PGUSER": "me", "PGPASSWORD": "x", "OPENAI_API_KEY": "k"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("POOL", raising=False)
    space: dict[str, Any] = {}
    exec(as_program(converted.config).replace("memory = Memory", "memory = None and Memory"), space)
    assert space["config"]["vector_store"]["config"] == {
        "connection_string": "postgresql://me:x@h/db",
        "collection_name": "memories",
        "embedding_model_dims": 384,
        "maxconn": 5,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('config = {"llm": "openai"\n  "embedder": "openai"}', r"app\.py, line 2: this is no Python"),
        ("x = 1\n", "no configuration of Mem0"),
        ("Memory.from_config(load())\n", r"line 1: no configuration"),
        (
            'a = {"llm": "openai"}\na = {"llm": "groq"}\nMemory.from_config(a)\n',
            "assigned more than once, on lines 1, 2",
        ),
        ('a = {"llm": "openai"}\nb = {"llm": "groq"}\n', "2 configurations, on lines 1, 2"),
        ('a = {"llm": "openai"}\nif X:\n    a["llm"] = "groq"\nMemory.from_config(a)\n', "line 3: what is set on `a`"),
        ("a = a\nMemory.from_config(a)\n", "no configuration of Mem0"),
        ("a = [a, a]\nMemory.from_config(a)\n", "line 2: no configuration"),
        ('a = {"llm": "x"}\na |= other\nMemory.from_config(a)\n', "line 2: what is set on `a`"),
        ('a = {"llm": "x"}\na["llm"].update(b)\nMemory.from_config(a)\n', "line 2: what is set on `a`"),
        ('a = {"llm": "x"}\ndel a["llm"]\n', "line 2: what is set on `a`"),
        ('a = {"llm": "x"}\ndef f():\n    a["llm"] = "y"\n', "line 3: what is set on `a`"),
    ],
)
def test_a_program_that_cannot_be_followed_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SourceDataError, match=message):
        read_configuration(write(tmp_path, "app.py", text))


@pytest.mark.parametrize(
    "text",
    [
        'Memory.from_config({"llm": {"provider": "groq"}})',
        'async def f():\n    return await AsyncMemory.from_config({"llm": {"provider": "groq"}})',
        'm = Memory(MemoryConfig(llm=LlmConfig(provider="groq")))',
        'm = Memory(config=MemoryConfig(llm={"provider": "groq"}))',
        'CONFIG: dict = {"llm": {"provider": "groq"}}',
        'config = {"llm": {"provider": "groq"}}\ndef f(config):\n    return Memory.from_config(config)',
        'def f():\n    c = {"llm": {"provider": "groq"}}\n    return mem0.Memory.from_config(c)',
    ],
)
def test_a_configuration_is_found_however_it_is_given(tmp_path: Path, text: str) -> None:
    assert read_configuration(write(tmp_path, "app.py", text)) == {"llm": {"provider": "groq"}}


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    from memharbor.mem0_config.python_source import read_python

    message = "app.py"
    try:
        read_python(text, "app.py")
    except SourceDataError as exc:
        message = exc.message
    assert "app.py" in message


# Data files

WANTED = {"llm": {"provider": "groq", "config": {"api_key": Text((Variable("GROQ_API_KEY"),))}}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"llm": {"provider": "groq", "config": {"api_key": "${GROQ_API_KEY}"}}}'),
        ("b.json", '{"mem0": {"llm": {"provider": "groq", "config": {"api_key": "${GROQ_API_KEY}"}}}, "port": 1}'),
        ("a.toml", '[llm]\nprovider = "groq"\n[llm.config]\napi_key = "${GROQ_API_KEY}"\n'),
        ("a.yaml", "llm:\n  provider: groq\n  config:\n    api_key: ${GROQ_API_KEY}\n"),
        ("a.YML", "llm: {provider: groq, config: {api_key: '${GROQ_API_KEY}'}}\n"),
    ],
)
def test_data_files_are_read(tmp_path: Path, name: str, text: str) -> None:
    assert read_configuration(write(tmp_path, name, text)) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"llm":\n oops}', "line 2: this is no JSON"),
        ("a.toml", "x = 1\nllm = oops\n", "line 2: this is no TOML"),
        ("a.yaml", "a: 1\nllm: [\n", "this is no YAML"),
        ("a.json", "[]", "holds no configuration"),
        ("a.json", '{"a": {"llm": "x"}, "b": {"llm": "x"}}', "holds 2 configurations"),
    ],
)
def test_a_data_file_that_cannot_be_understood_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SourceDataError, match=message):
        read_configuration(write(tmp_path, name, text))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of"):
        read_configuration(write(tmp_path, "a.ini", ""))


def test_yaml_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError) as caught:
        read_configuration(write(tmp_path, "a.yaml", "llm: x"))
    assert "pip install pyyaml" in caught.value.hints[0]


# Secrets


@pytest.mark.parametrize(
    ("config", "variable"),
    [
        ({"llm": {"provider": "openai", "config": {"api_key": SECRET}}}, "OPENAI_API_KEY"),
        ({"llm": {"provider": "azure_openai", "config": {"azure_kwargs": {"api_key": SECRET}}}}, None),
        ({"llm": {"provider": "openai", "config": {"model": f"x {KEY_OF_OPENAI}"}}}, None),
        ({"llm": {"config": {"default_headers": {"Authorization": f"Bearer {SECRET}"}}}}, None),
        ({"llm": {"config": {"headers": {"X-Whatever": f"Bearer {SECRET}"}}}}, None),
        ({"vector_store": {"config": {"password": SECRET}}}, "MEM0_VECTOR_STORE_PASSWORD"),
        ({"vector_store": {"config": {"password": 1234567}}}, "MEM0_VECTOR_STORE_PASSWORD"),
        ({"vector_store": {"config": {"connection_string": f"postgresql://u:{SECRET}@h/d"}}}, None),
        ({"vector_store": {"config": {"connection_string": f"postgresql://u:p@ss{SECRET}@h/d"}}}, None),
        ({"vector_store": {"config": {"connection_string": f"host=h password={SECRET}"}}}, None),
        ({"vector_store": {"config": {"connection_string": f"postgresql://h/d?password={SECRET}"}}}, None),
        ({"vector_store": {"config": {"url": "https://u:hunter2@h/d"}}}, None),  # pragma: allowlist secret
        ({"vector_store": {"config": {"hosts": [{"token": SECRET}]}}}, None),
        ({"custom_instructions": f"Never store {KEY_OF_OPENAI}"}, None),
        (
            {
                "vector_store": {
                    "config": {"connection_string": Text(("postgresql://", Variable("U"), f":{SECRET}@h/d"))}
                }
            },
            None,
        ),
        ({"llm": {"config": {"api_key": Text((Variable("K", default=SECRET),))}}}, "K"),
        ({"llm": {"config": {"model": Text((Variable("MY_TOKEN", default="hunter2"),))}}}, "MY_TOKEN"),
        ({"vector_store": {"config": {"dsn": Text(("redis://u:", Variable("K", "hunter2"), "@h"))}}}, "K"),
        ({"vector_store": {"config": {"dsn": Text(("host=h password=", Variable("K", "hunter2")))}}}, "K"),
        ({"vector_store": {"config": {"dsn": Text((Variable("K", default=f"redis://u:{SECRET}@h"),))}}}, "K"),
    ],
)
def test_no_secret_of_a_file_is_printed(config: dict[str, Any], variable: str | None) -> None:
    replaced, found = replace_secrets(config)
    shown = as_json(replaced) + as_program(replaced)
    for secret in (SECRET, KEY_OF_OPENAI, "hunter2", "1234567", "ss" + SECRET):
        assert secret not in shown
    assert len(found) == 1
    assert variable in (None, found[0].variable)
    assert found[0].variable in shown


@pytest.mark.parametrize(
    "config",
    [
        {"llm": {"config": {"max_tokens": 2000, "model": "gpt-4o", "openai_base_url": "http://h:8080/v1/a@b"}}},
        {"llm": {"config": {"api_key": Text((Variable("K"),))}}},
        {"vector_store": {"config": {"connection_string": Text(("postgresql://u:", Variable("P"), "@h/d"))}}},
        {"vector_store": {"config": {"connection_string": "postgresql://u@h:5432/d?sslmode=require"}}},
        {"custom_instructions": "Basic information only; a password = nothing to keep"},
        {"vector_store": {"config": {"on_disk": True, "password": None}}},
    ],
)
def test_what_is_no_secret_is_left_alone(config: dict[str, Any]) -> None:
    assert replace_secrets(config) == (config, [])


def test_two_secrets_of_one_name_get_two_variables() -> None:
    stores = {"hosts": [{"url": "redis://u:first@a"}, {"url": "redis://u:second@b"}]}  # pragma: allowlist secret
    replaced, found = replace_secrets({"vector_store": {"provider": "redis", "config": stores}})
    assert len({each.variable for each in found}) == 2
    assert "first" not in as_json(replaced)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=40))
def test_no_password_of_a_uri_is_left(password: str) -> None:
    secret = f"Zq9{password}9qZ"
    replaced, found = replace_secrets(
        {"vector_store": {"config": {"connection_string": f"postgresql://u:{secret}@h/d"}}}
    )
    assert found
    shown = as_data(replaced)["vector_store"]["config"]["connection_string"]
    # What stands around it is no secret, whatever the password looks like.
    middle = shown.removeprefix("postgresql://u:").removesuffix("@h/d")
    assert len(middle) < len(shown) - len("postgresql://u:")
    assert password not in re.sub(r"\$\{MEM0_[A-Z0-9_]+\}", "", middle)


# For a stack


def test_the_configuration_of_the_service_runs_and_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = for_service(DSN, 384, "text-embedding-3-small")
    assert "p%40ss" not in printed.text + str(printed)
    monkeypatch.setenv("MEMHARBOR_SERVICE_PASSWORD", "p@ss/w0rd#")
    space: dict[str, Any] = {}
    exec(printed.text.replace("memory = Memory", "memory = None and Memory"), space)
    store = space["config"]["vector_store"]["config"]
    assert (
        store["connection_string"]
        == (
            "postgresql://memharbor_service:p%40ss%2Fw0rd%23@db.example.org:6432/memories?sslmode=verify-full&sslrootcert=/ca.crt"  # pragma: allowlist secret
        )
    )
    assert (store["collection_name"], store["embedding_model_dims"], store["hnsw"]) == ("mem0", 384, True)
    assert space["config"]["embedder"]["config"] == {"model": "text-embedding-3-small", "embedding_dims": 384}
    assert "${MEMHARBOR_SERVICE_PASSWORD_ENCODED}" in json.dumps(printed.data)
    assert any("quote" in note for note in printed.notes)


def test_the_installed_mem0_takes_what_is_printed() -> None:
    checker = checking.Checker()
    assert checker.problems(for_service(DSN, 1536, "m").data) == []
    data = for_users(DSN, 3072, "m", 5).data
    data["vector_store"]["config"]["connection_pool"] = object()
    assert checker.problems(data) == []
    assert data["vector_store"]["config"]["hnsw"] is False
    from mem0.configs.vector_stores.pgvector import PGVectorConfig

    assert set(PGVectorConfig.model_fields) == rules.PGVECTOR_KEYS
    for component in ("llm", "embedder", "vector_store"):
        known = checker.keys(component, data[component]["provider"])
        assert known is not None
        assert set(data[component]["config"]) <= known


def test_the_configuration_for_users_binds_each_to_the_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    printed = for_users(DSN.replace("service", "app"), DIMS, "text-embedding-3-small", 3)
    monkeypatch.setenv("MEMHARBOR_APP_PASSWORD", "x")
    monkeypatch.setenv("OPENAI_API_KEY", ANY_KEY)
    monkeypatch.setenv("MEM0_HISTORY_DB", str(tmp_path / "history.db"))
    checking.Checker()  # sets up Mem0 without telemetry
    space: dict[str, Any] = {}
    # The pool must not look for a server here.
    exec(printed.text.replace("open=True", "open=False").replace("min_size=1", "min_size=0"), space)
    memory = space["memory_of"]("alice")
    try:
        assert repr(memory.vector_store.connection_pool) == "UserPool(user_id='alice')"
        assert memory.reranker.llm.config.model == rules.NEW_LLM
        assert space["pool"].max_size == 3
    finally:
        for closed in (memory, memory.embedding_model.client, memory.llm.client, memory.reranker.llm.client):
            closed.close()


def test_the_server_gets_its_variables() -> None:
    printed = for_server(DSN, 1536, "text-embedding-3-small")
    assert printed.data == {
        "POSTGRES_HOST": "db.example.org",
        "POSTGRES_PORT": "6432",
        "POSTGRES_DB": "memories",
        "POSTGRES_USER": "memharbor_service",
        "POSTGRES_PASSWORD": "${MEMHARBOR_SERVICE_PASSWORD_ENCODED}",  # pragma: allowlist secret
        "POSTGRES_COLLECTION_NAME": "mem0",
        "PGSSLMODE": "verify-full",
        "HISTORY_DB_PATH": "/app/history/history.db",
        "MEM0_DEFAULT_LLM_MODEL": rules.NEW_LLM,
        "MEM0_DEFAULT_EMBEDDER_MODEL": "text-embedding-3-small",
        "MEM0_TELEMETRY": "False",
        "PGSSLROOTCERT": "/ca.crt",
    }
    assert printed.text.splitlines() == [f"{name}={value}" for name, value in printed.data.items()]
    assert "384" in for_server(DSN, 384, "text-embedding-3-small").notes[-1]


def test_secrets_in_the_parameters_of_a_uri_are_left_out() -> None:
    dsn = f"postgresql://me@h/d?password={SECRET}&sslpassword={SECRET}&sslmode=require"
    for make in (for_service, for_server):
        printed = make(dsn, 1536, "text-embedding-3-small")
        assert SECRET not in str(printed)


def test_no_model_of_openai_is_wide_enough() -> None:
    with pytest.raises(ConfigError, match=r"3,800 dimensions"):
        choose_model(3800, None)


# Commands


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    config_group.main(list(arguments), standalone_mode=False)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_convert_prints_the_configuration_and_says_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path, "old.json", json.dumps({"vector_store": as_data(old_store()), "graph_store": {"provider": "kuzu"}})
    )
    out, err = run("convert", str(path), capsys=capsys)
    assert json.loads(out)["vector_store"]["provider"] == "pgvector"
    assert "dropped `graph_store`" in err
    out, _ = run("convert", str(path), "--output", "json", "--format", "python", "--from", "1.0", capsys=capsys)
    data = json.loads(out)
    assert data["from"] == "1.0"
    assert data["checked_by"] == versions.MEM0AI
    assert {"kind": "dropped", "key": "graph_store"}.items() <= data["notes"][0].items()
    assert "Memory.from_config(config)" in data["python"]


@pytest.mark.parametrize("kind", ["basic", "enterprise", "server"])
def test_mem0_prints_a_configuration_of_any_database(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("SERVICE", "APP"):
        monkeypatch.setenv(f"MEMHARBOR_{role}_PASSWORD", SECRET)
    monkeypatch.delenv("MEMHARBOR_EMBEDDING_MODEL", raising=False)
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", "384")
    out, err = run("mem0", f"--{kind}", "--dsn", "postgresql://admin@db.example.org/memories", capsys=capsys)
    assert "db.example.org" in out
    assert "text-embedding-3-small" in out
    assert SECRET not in out + err
    out, _ = run("mem0", f"--{kind}", "--dsn", "postgresql://admin@h/d", "--output", "json", capsys=capsys)
    data = json.loads(out)
    assert "environment" in data if kind == "server" else data["config"]["embedder"]["config"]["embedding_dims"] == 384


def test_mem0_asks_which_one_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="which configuration"):
        run("mem0", "--dsn", "postgresql://admin@h/d", capsys=capsys)


def test_every_function_of_the_command_has_help_with_an_example() -> None:
    context = click.Context(config_group)
    for name in config_group.list_commands(context):
        command = config_group.get_command(context, name)
        assert command is not None
        assert "Example" in (command.help or "")


# Against the old releases


DEFAULTS = """
import json, re, sys
from pathlib import Path
import mem0
found = {}
for component, folder in (("llm", "llms"), ("embedder", "embeddings")):
    for path in sorted((Path(mem0.__file__).parent / folder).glob("*.py")):
        names = re.findall(r'config\\.model = (?:self\\.config\\.model or )?"([^"]+)"', path.read_text())
        if names:
            found[f"{component} {path.stem}"] = names[-1]
print(json.dumps(found))
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", OLD_RELEASES)
def test_the_table_of_defaults_is_that_of_the_releases(release: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(environment(release)), "-c", DEFAULTS],
        env={**os.environ, "MEM0_TELEMETRY": "False", "MEM0_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) > 18
    for name, model in found.items():
        component, provider = name.split()
        assert rules.old_model(component, provider, "0.1" if release.startswith("0.1") else "1.0") == model, name


def test_references_are_read_and_written_alike() -> None:
    assert as_data(with_references({"a": ["x${B}y"]})) == {"a": ["x${B}y"]}
