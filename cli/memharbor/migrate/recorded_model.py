"""
Which model made the embeddings of a database: on record in its table `configs`, from the first one that we made on.
"""

from __future__ import annotations

from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.migrate.embedding.model import REEMBED_COMMAND, check_fit
from memharbor.migrate.opening import EmbeddingSpec
from memharbor.names import ROLES
from memharbor.target import Target

# The row's key.
MODEL_KEY = "embedding_model"

_READ = "select value ->> 'model' from memharbor.configs where key = %s"


def read_model(connection: Connection) -> str | None:
    """Read which model made the embeddings; `None` where nobody knows."""
    # An administrator who is no superuser sees no row of tables under row level security.
    with translated_errors("asking the database"), transaction(connection, role=ROLES["service"]):
        row = connection.execute(_READ, (MODEL_KEY,)).fetchone()
    return None if row is None else str(row[0])


def refuse_other_model(connection: Connection, target: Target, spec: EmbeddingSpec) -> None:
    """
    Refuse a model whose embeddings do not fit the schema, or those that are there.

    Raises:
        ConfigError: They do not fit the schema.
        StateRefusedError: Another model made those that are there.
    """
    check_fit(
        spec.model,
        spec.dims,
        schema_dims=target.settings.embedding_dims,
        schema_distance=target.settings.embedding_distance,
        recorded_model=read_model(connection),
    )


def note_model(connection: Connection, spec: EmbeddingSpec) -> None:
    """
    Note which model made embeddings, in the transaction that writes them, as the service role.

    Raises:
        StateRefusedError: Another model has made some meanwhile.
    """
    connection.execute(
        "insert into memharbor.configs (key, value)"
        " values (%s, jsonb_build_object('model', %s::text, 'dims', %s::integer)) on conflict (key) do nothing",
        (MODEL_KEY, spec.model, spec.dims),
    )
    row = connection.execute(_READ, (MODEL_KEY,)).fetchone()
    if row is not None and row[0] != spec.model:
        raise StateRefusedError(
            f"embeddings by `{row[0]}` came in meanwhile, and those of `{spec.model}` cannot be compared with them",
            hint=f"{REEMBED_COMMAND} --model {spec.model}",
        )
