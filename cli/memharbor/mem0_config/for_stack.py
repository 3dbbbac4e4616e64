"""
Configurations of Mem0 for a stack: the service, one `Memory` per user, and Mem0's own server.

Given where the database is; connects to nothing. Passwords are references to the environment. Pure.

Source: mem0ai, `vector_stores/pgvector.py` and `llms/base.py`; mem0ai/mem0, `server/main.py` and `server/db.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from memharbor.errors import ConfigError
from memharbor.mem0_config import rules
from memharbor.mem0_config.render import Code, as_data, as_program, expression, with_imports
from memharbor.mem0_config.values import Text, Variable, join

_HISTORY = Text((Variable("MEM0_HISTORY_DB", "mem0-history.db"),))
_MODELS = {1536: "text-embedding-3-small", 3072: "text-embedding-3-large"}
_ENCODE = "import os, urllib.parse; print(urllib.parse.quote(os.environ['{name}'], safe=''))"


@dataclass(frozen=True)
class Printed:
    """
    A configuration that can be used as it is.

    Args:
        text: A program, or lines for the environment.
        data: The same as data.
        notes: What to know, sentences without a final stop.
    """

    text: str
    data: dict[str, Any]
    notes: tuple[str, ...]


def choose_model(dims: int, model: str | None) -> str:
    """
    Choose the embedding model of OpenAI that gives so many dimensions.

    Raises:
        ConfigError: None does, and none is named.

    >>> choose_model(384, None), choose_model(3072, None), choose_model(384, "my-model")
    ('text-embedding-3-small', 'text-embedding-3-large', 'my-model')
    """
    found = model or next((name for most, name in _MODELS.items() if dims <= most), None)
    if found is None:
        raise ConfigError(f"no model of OpenAI gives {dims:,} dimensions", hint="name one with `--model NAME`")
    return found


def for_service(dsn: str, dims: int, model: str) -> Printed:
    """
    Configure Mem0 as the service: a connection string and nothing of ours.

    Args:
        dsn: Of the service role; its password is left out.
        dims: Of the stack.
        model: That embeds.
    """
    variable = "MEMHARBOR_SERVICE_PASSWORD"
    config = _whole({"connection_string": _referring(dsn, variable)}, dims, model)
    return Printed(as_program(config), as_data(config), (*_how(variable, "service"), *_both()))


def for_users(dsn: str, dims: int, model: str, pool_size: int) -> Printed:
    """
    Configure one light `Memory` per user over one pool, so that PostgreSQL keeps users apart.

    Args:
        dsn: Of the app role; its password is left out.
        dims: Of the stack.
        model: That embeds.
        pool_size: Connections that the program may hold.
    """
    variable = "MEMHARBOR_APP_PASSWORD"
    config = _whole({"connection_pool": Code("user_pool(pool, user_id)")}, dims, model)
    llm = {"provider": "openai", "config": {"model": rules.NEW_LLM, "is_reasoning_model": True}}
    config["reranker"] = {"provider": "llm_reranker", "config": {"llm": llm, "top_k": 5}}
    body = (
        f"pool = ConnectionPool(\n    {expression(_referring(dsn, variable))},\n    min_size=1,\n"
        f"    max_size={pool_size},\n    open=True,\n)\n\n\n"
        'def memory_of(user_id: str) -> Memory:\n    """Make the light Memory of one user, over the one pool."""\n'
        f"    return Memory.from_config({expression(config, 1)})"
    )
    imports = ("from memharbor.mem0 import user_pool", "from psycopg_pool import ConnectionPool")
    del config["vector_store"]["config"]["connection_pool"]
    notes = (
        *_how(variable, "app"),
        *_both(),
        "`connection_pool` is an object: it is in the Python form only",
        "the reranker asks the model once for each memory that was found, and only where `search(…, rerank=True)` asks for it",
        "PostgreSQL decides by `user_id`; `org_id` and roles are metadata to Mem0, and filters are no protection",
        "the audit trail is `memharbor.memory_history`; the file of `MEM0_HISTORY_DB` is Mem0's own and holds all users",
    )
    return Printed(with_imports(body, imports), as_data(config), notes)


def for_server(dsn: str, dims: int, model: str) -> Printed:
    """
    List the variables that Mem0's own server reads.

    Args:
        dsn: Of the service role; its password is left out.
        dims: Of the stack.
        model: That embeds.
    """
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    variable = "MEMHARBOR_SERVICE_PASSWORD"
    values: dict[str, Any] = {
        "POSTGRES_HOST": parts.hostname or query.get("host", "localhost"),
        "POSTGRES_PORT": str(parts.port or query.get("port", 5432)),
        "POSTGRES_DB": unquote(parts.path.lstrip("/")),
        "POSTGRES_USER": unquote(parts.username or query.get("user", "")),
        "POSTGRES_PASSWORD": Text((Variable(variable, encoded=True),)),
        "POSTGRES_COLLECTION_NAME": rules.DEFAULT_COLLECTION,
        "PGSSLMODE": query.get("sslmode", "prefer"),
        "HISTORY_DB_PATH": "/app/history/history.db",
        "MEM0_DEFAULT_LLM_MODEL": rules.NEW_LLM,
        "MEM0_DEFAULT_EMBEDDER_MODEL": model,
        "MEM0_TELEMETRY": "False",
    }
    if "sslrootcert" in query:
        values["PGSSLROOTCERT"] = query["sslrootcert"]
    data: dict[str, str] = as_data(values)
    notes = [
        *_how(variable, "service"),
        "host, port and the file of PGSSLROOTCERT are as seen from this machine: from a container they may be others",
        "the server keeps its users and keys in a second database of the same host and role, `APP_DB_NAME` (`mem0_app`),"
        " which neither a stack nor its pool has: a release of the server that asks for it needs an administrator to make it"
        " for `memharbor_service`, and the port that leads straight to PostgreSQL",
        "any key of the server reads and writes every user's memories: only your network protects them from each other",
    ]
    if dims != rules.real_dims(model):
        notes.append(
            f"the server asks for no number of dimensions: `{model}` must give {dims} by itself, which this stack stores"
        )
    return Printed("\n".join(f"{name}={value}" for name, value in data.items()), data, tuple(notes))


def _whole(where: dict[str, Any], dims: int, model: str) -> dict[str, Any]:
    return {
        "vector_store": {
            "provider": "pgvector",
            "config": {
                **where,
                "collection_name": rules.DEFAULT_COLLECTION,
                "embedding_model_dims": dims,
                # The tables are there, and their indexes too: Mem0 makes none. On an empty database this would matter.
                "hnsw": dims <= rules.HNSW_DIMS_MAX,
            },
        },
        "llm": {"provider": "openai", "config": {"model": rules.NEW_LLM, "is_reasoning_model": True}},
        "embedder": {"provider": "openai", "config": {"model": model, "embedding_dims": dims}},
        "history_db_path": _HISTORY,
        "version": "v1.1",
    }


def _referring(dsn: str, variable: str) -> str | Text:
    """Put a reference where the password of a URI stands, and leave other secrets out of it."""
    parts = urlsplit(dsn)
    login, _, place = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name not in ("password", "sslpassword", "user")]
    query = f"?{urlencode(kept, safe='/')}" if kept else ""
    end = f"@{place}{parts.path}{query}"
    return join([f"{parts.scheme}://{user}:", Variable(variable, encoded=True), end])


def _how(variable: str, role: str) -> tuple[str, ...]:
    encode = _ENCODE.format(name=variable)
    return (
        f'the password, as it is: eval "$(memharbor stack env --role {role})"; export {variable}="$PGPASSWORD"',
        f'where {variable}_ENCODED is read, percent-encoded: export {variable}_ENCODED="$(python3 -c "{encode}")"',
    )


def _both() -> tuple[str, ...]:
    return (
        "OPENAI_API_KEY is read by Mem0 itself; so is MEM0_TELEMETRY=False, without which it opens a third pool and calls home",
        "each `Memory` has the pool that it is given and one for its entities",
    )
