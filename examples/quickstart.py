"""
Two users on one database with unmodified Mem0, in both ways that Memharbor supports; neither sees the other's memories.

    pip install 'memharbor[mem0]'
    eval "$(memharbor stack env)"
    python examples/quickstart.py

Without an API key it runs on Memharbor's own small embedder, which knows words and no meaning. With OPENAI_API_KEY (and
OPENAI_BASE_URL, for a model of your own) it uses real embeddings; MEMHARBOR_EMBEDDING_MODEL names the model.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psycopg_pool import ConnectionPool

from memharbor.embedder import ANY_KEY, EMBEDDER_NAME, EmbeddingServer
from memharbor.mem0 import user_pool

os.environ["MEM0_TELEMETRY"] = "False"  # before the import: Mem0 reads it once, and would call home otherwise
from mem0 import Memory

MEMORIES = {
    "quickstart-alice": ["Alice is allergic to peanuts", "Alice is learning to sail"],
    "quickstart-bob": ["Bob is allergic to cats", "Bob is learning to bake"],
}
QUESTION = "what is this person allergic to?"


def main() -> None:
    """Remember something of two users in both ways, and fail if one ever sees the other's."""
    try:
        service_dsn, app_dsn = os.environ["MEMHARBOR_SERVICE_DSN"], os.environ["MEMHARBOR_APP_DSN"]
    except KeyError as missing:
        sys.exit(f'{missing} is not set; run this first: eval "$(memharbor stack env)"')
    logging.getLogger("mem0").setLevel(logging.ERROR)  # it warns that spaCy, which is optional, is missing
    dims = int(os.environ.get("MEMHARBOR_EMBEDDING_DIMS", "1536"))

    with embedder(dims) as embedder_config, tempfile.TemporaryDirectory() as folder:

        def memory_on(where: dict[str, Any]) -> Memory:
            return Memory.from_config(
                {
                    "vector_store": {"provider": "pgvector", "config": {"embedding_model_dims": dims, **where}},
                    "embedder": embedder_config,
                    # Only `add` with `infer=True` (Mem0's default) asks a model what is worth remembering.
                    "llm": {"provider": "openai", "config": {"api_key": os.environ.get("OPENAI_API_KEY", ANY_KEY)}},
                    "history_db_path": str(Path(folder, "history.db")),  # Mem0 keeps its history in SQLite
                }
            )

        print("\nThe service role: plain Mem0 and a connection string; who is asking is a filter.")
        memory = memory_on({"connection_string": service_dsn})
        for user_id, texts in MEMORIES.items():
            memory.delete_all(user_id=user_id)  # of an earlier run
            for text in texts:
                memory.add(text, user_id=user_id, infer=False)
        for user_id in MEMORIES:
            show(memory, user_id)

        print("\nThe app role: one pool for all, one Mem0 per user; PostgreSQL itself refuses the rest.")
        with ConnectionPool(app_dsn, open=True) as pool:
            for user_id in MEMORIES:
                memory = memory_on({"connection_pool": user_pool(pool, user_id)})
                show(memory, user_id)
                for other_id in MEMORIES.keys() - {user_id}:
                    found = memory.get_all(filters={"user_id": other_id})["results"]
                    print(f"  {user_id} asks for everything of {other_id}: {len(found)} memories")
                    if found:
                        sys.exit(f"isolation failed: {user_id} sees memories of {other_id}")


def show(memory: Memory, user_id: str) -> None:
    """Ask one user's question and check that the answers are that user's own, and all of them."""
    found = memory.search(QUESTION, filters={"user_id": user_id}, threshold=0.0)["results"]
    print(f"  {user_id} asks {QUESTION!r}")
    for result in found:
        print(f"    {result['score']:.2f}  {result['memory']}")
    if sorted(result["memory"] for result in found) != MEMORIES[user_id]:
        sys.exit(f"isolation failed: these are not the memories of {user_id}")


@contextmanager
def embedder(dims: int) -> Iterator[dict[str, Any]]:
    """Choose real embeddings where a key is set, else Memharbor's own embedder on a loopback server."""
    config: dict[str, Any] = {"embedding_dims": dims}
    if os.environ.get("OPENAI_API_KEY"):
        config["model"] = os.environ.get("MEMHARBOR_EMBEDDING_MODEL", "text-embedding-3-small")
        print(f"Embeddings: {config['model']}, {dims} dimensions")
        yield {"provider": "openai", "config": config}
        return
    print(
        f"Embeddings: {EMBEDDER_NAME}, {dims} dimensions: a small deterministic embedder, since there is no OPENAI_API_KEY"
    )
    print("It compares words, not meaning.")
    with EmbeddingServer(dims) as server:
        yield {"provider": "openai", "config": {**config, "api_key": ANY_KEY, "openai_base_url": server.base_url}}


if __name__ == "__main__":
    main()
