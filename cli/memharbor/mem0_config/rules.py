"""
What changed between the configurations of Mem0 0.1.x, 1.x and 2.x, as tables.

Source: the releases themselves, mem0ai 0.1.118, 1.0.11 and that of `memharbor.versions`; `tests/unit/test_mem0_config.py` holds the defaults to
the installed releases in the soak tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Release = Literal["0.1", "1.0"]
Component = Literal["vector_store", "llm", "embedder", "reranker"]

COMPONENTS: tuple[Component, ...] = ("vector_store", "llm", "embedder", "reranker")
TOP_KEYS = frozenset({*COMPONENTS, "history_db_path", "version", "custom_instructions"})

DROPPED: Mapping[str, str] = {
    "graph_store": "graph stores were removed in 2.0.0; what the graph held stays where it is and is no longer read",
    "enable_graph": "graph stores were removed in 2.0.0",
    "custom_update_memory_prompt": "since 2.0.0 `add` only adds and never updates or deletes: there is nothing to prompt",
}
RENAMED: Mapping[str, str] = {
    "custom_fact_extraction_prompt": "custom_instructions",
    "custom_prompt": "custom_instructions",  # its first name
}
PROMPT_CHANGED = (
    "it was the whole prompt and is now a section of Mem0's own: take out what it says about the form of the answer"
    ' (`{"facts": …}`)'
)

# Names that were never providers, but stand in many guides.
STORE_ALIASES: Mapping[str, str] = {"postgres": "pgvector", "postgresql": "pgvector"}
STORE_KEYS: Mapping[str, str] = {
    "url": "connection_string",
    "table_name": "collection_name",
    "embedding_dimension": "embedding_model_dims",
    "embedding_dims": "embedding_model_dims",
    "database": "dbname",
    "username": "user",
    "pool_size": "maxconn",
}
# mem0ai, configs/vector_stores/pgvector.py, PGVectorConfig; a test holds it to the installed release.
PGVECTOR_KEYS = frozenset(
    {
        "dbname",
        "collection_name",
        "embedding_model_dims",
        "user",
        "password",  # pragma: allowlist secret
        "host",
        "port",
        "diskann",
        "hnsw",
        "minconn",
        "maxconn",
        "sslmode",
        "connection_string",
        "connection_pool",
    }
)

# Above these dimensions pgvector builds no HNSW index over `vector`. Source: pgvector README, HNSW.
HNSW_DIMS_MAX = 2000
DEFAULT_COLLECTION = "mem0"
DEFAULT_DIMS = 1536
DEFAULT_PROVIDERS: Mapping[Component, str] = {
    "vector_store": "qdrant",
    "llm": "openai",
    "embedder": "openai",
    "reranker": "cohere",
}
NEW_LLM = "gpt-5-mini"

# What a provider's class takes where the configuration names no model: 0.1.118, 1.0.11. Equal ones are named once.
_LLM_MODELS: Mapping[str, str | tuple[str, str]] = {
    "openai": ("gpt-4o-mini", "gpt-4.1-nano-2025-04-14"),
    "openai_structured": "gpt-4o-2024-08-06",
    "azure_openai": ("gpt-4o", "gpt-4.1-nano-2025-04-14"),
    "azure_openai_structured": ("gpt-4o-2024-08-06", "gpt-4.1-nano-2025-04-14"),
    "litellm": ("gpt-4o-mini", "gpt-4.1-nano-2025-04-14"),
    "anthropic": "claude-3-5-sonnet-20240620",
    "together": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "xai": "grok-2-latest",
    "groq": ("llama3-70b-8192", "llama-3.3-70b-versatile"),
    "gemini": "gemini-2.0-flash",
    "ollama": "llama3.1:70b",
    "deepseek": "deepseek-chat",
    "sarvam": "sarvam-m",
    "vllm": "Qwen/Qwen2.5-32B-Instruct",
    "minimax": "MiniMax-M2.7",
}
_EMBEDDER_MODELS: Mapping[str, str | tuple[str, str]] = {
    "openai": "text-embedding-3-small",
    "gemini": ("models/text-embedding-004", "models/gemini-embedding-001"),
    "vertexai": ("text-embedding-004", "gemini-embedding-001"),
    "together": "togethercomputer/m2-bert-80M-8k-retrieval",
    "huggingface": "multi-qa-MiniLM-L6-cos-v1",
    "ollama": "nomic-embed-text",
    "aws_bedrock": "amazon.titan-embed-text-v1",
    "fastembed": "thenlper/gte-large",
    "lmstudio": "nomic-ai/nomic-embed-text-v1.5-GGUF/nomic-embed-text-v1.5.f16.gguf",
}
# Only where the class sends them to the service, so that they decide what comes back. `ollama` and `lmstudio` name
# dimensions that their models do not have.
_EMBEDDER_DIMS: Mapping[str, int] = {"openai": 1536, "gemini": 768, "vertexai": 256, "together": 768}
_REAL_DIMS: Mapping[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
    "models/text-embedding-004": 768,
    "togethercomputer/m2-bert-80M-8k-retrieval": 768,
    "multi-qa-MiniLM-L6-cos-v1": 384,
    "nomic-embed-text": 768,
    "amazon.titan-embed-text-v1": 1536,
    "thenlper/gte-large": 1024,
}


def old_model(component: Component, provider: str, release: Release) -> str | None:
    """
    Name the model that a release took where the configuration named none.

    >>> old_model("llm", "openai", "0.1"), old_model("llm", "openai", "1.0")
    ('gpt-4o-mini', 'gpt-4.1-nano-2025-04-14')
    """
    models = {"llm": _LLM_MODELS, "embedder": _EMBEDDER_MODELS}.get(component, {})
    model = models.get(provider)
    return model[0 if release == "0.1" else 1] if isinstance(model, tuple) else model


def old_dims(provider: str, model: Any) -> int | None:
    """
    Say how many dimensions an embedder gave where the configuration did not say it.

    >>> old_dims("openai", "text-embedding-3-small"), old_dims("openai", "a-model-of-my-own")
    (1536, None)
    """
    default = old_model("embedder", provider, "0.1"), old_model("embedder", provider, "1.0")
    return _EMBEDDER_DIMS.get(provider) if model in default else None


def real_dims(model: Any) -> int | None:
    """Say how many dimensions a known model gives by itself."""
    return _REAL_DIMS.get(model) if isinstance(model, str) else None


def is_configuration(value: Mapping[str, Any]) -> bool:
    """Say whether a dictionary looks like a configuration of Mem0."""
    return bool((TOP_KEYS - {"version"} | set(DROPPED) | set(RENAMED)) & set(value))
