"""Vector stores of old configurations: names that no release knew, collections that would not be found, dimensions."""

from __future__ import annotations

import re
import string
from typing import Any

from memharbor.mem0_config import rules
from memharbor.mem0_config.notes import Notes
from memharbor.mem0_config.rules import Release
from memharbor.mem0_config.values import Text, Variable, join, parts_of

# PostgreSQL folds exactly these in a name without quotes, where the encoding is UTF-8.
_FOLDED = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_DRIVER = re.compile(r"^(postgres(?:ql)?)\+\w+://")
_WITH_DIMS = frozenset({"pgvector", "qdrant"})
_PATH = "vector_store.config"


def convert_store(provider: str, config: dict[str, Any], notes: Notes) -> tuple[str, dict[str, Any]]:
    """
    Convert provider and keys of a vector store; only pgvector's need it.

    Args:
        provider: As the old configuration has it.
        config: Its keys; changed in place.
        notes: What is changed is added here.
    """
    if provider in rules.STORE_ALIASES:
        new = rules.STORE_ALIASES[provider]
        notes.add("changed", "vector_store.provider", f"from `{provider}`, which no release knows, to `{new}`")
        provider = new
    if provider != "pgvector":
        return provider, config
    for old, new in rules.STORE_KEYS.items():
        if old in config and new not in config:
            config[new] = config.pop(old)
            notes.add("renamed", f"{_PATH}.{old}", f"to `{new}`")
    _convert_connection(config, notes)
    _fold_collection(config, notes)
    return provider, config


def _convert_connection(config: dict[str, Any], notes: Notes) -> None:
    uri = config.get("connection_string")
    if isinstance(uri, str | Text):
        parts: list[str | Variable] = parts_of(uri)
        if parts and isinstance(parts[0], str) and _DRIVER.match(parts[0]):
            config["connection_string"] = join([_DRIVER.sub(r"\1://", parts[0]), *parts[1:]])
            notes.add("changed", f"{_PATH}.connection_string", "without the driver's name, which libpq does not take")
    elif config.get("connection_pool") is None and not (config.get("user") or config.get("password")):
        config["connection_string"] = Text((Variable("MEM0_CONNECTION_STRING"),))
        notes.add(
            "changed", f"{_PATH}.connection_string", "nothing says where the database is: `MEM0_CONNECTION_STRING`"
        )
    elif config.get("password") is not None:
        notes.add(
            "check",
            f"{_PATH}.password",
            "Mem0 pastes it into a URI as it is: characters like `@` and `/` must be percent-encoded",
        )


def _fold_collection(config: dict[str, Any], notes: Notes) -> None:
    collection = config.get("collection_name")
    if isinstance(collection, Text):
        notes.add(
            "check", f"{_PATH}.collection_name", "its value must be in lower case: 2.x quotes it, older ones did not"
        )
    elif isinstance(collection, str) and collection != collection.translate(_FOLDED):
        config["collection_name"] = collection.translate(_FOLDED)
        notes.add(
            "changed",
            f"{_PATH}.collection_name",
            f"from `{collection}` to `{collection.translate(_FOLDED)}`: the table is called so, because older releases did"
            " not quote its name; 2.x does, and would begin an empty one",
        )


def pin_dims(
    config: dict[str, Any], release: Release, notes: Notes, store_keys: frozenset[str] | None, *, certain: bool
) -> None:
    """
    Write the dimensions of embedder and vector store down, which are two settings that know nothing of each other.

    Args:
        config: A configuration with both components; changed in place.
        release: What it was written for.
        notes: What is changed is added here.
        store_keys: What the store's configuration takes, where that is known.
        certain: Whether the release was given, and not told by the keys.
    """
    embedder, store = config["embedder"], config["vector_store"]
    dims = embedder["config"].get("embedding_dims")
    if dims is None:
        dims = _embedder_dims(embedder, release)
        if dims is not None:
            embedder["config"]["embedding_dims"] = dims
            text = f"{dims}, which {release} asked its model for"
            if not certain and dims != _embedder_dims(embedder, "1.0"):
                text += "; pass `--from 1.0` if it ran there, which asked for none"
            notes.add("pinned", "embedder.config.embedding_dims", text)
    if "embedding_model_dims" in (_WITH_DIMS_KEYS if store["provider"] in _WITH_DIMS else store_keys or ()):
        _pin_store_dims(store, dims, rules.real_dims(embedder["config"].get("model")), notes)
    if store["provider"] == "pgvector":
        _fit_index(store["config"], notes)


_WITH_DIMS_KEYS = frozenset({"embedding_model_dims"})


def _embedder_dims(embedder: dict[str, Any], release: Release) -> int | None:
    provider, config = embedder["provider"], embedder["config"]
    model = config.get("model")
    if provider == "openai":
        if release == "0.1":
            return rules.DEFAULT_DIMS  # it always asked for so many, whatever the model
        return rules.real_dims(model) if str(model).startswith("text-embedding-3-") else None
    if provider == "gemini" and config.get("output_dimensionality") is not None:
        return None
    return rules.old_dims(provider, model)


def _pin_store_dims(store: dict[str, Any], dims: Any, real: int | None, notes: Notes) -> None:
    key = f"{_PATH}.embedding_model_dims"
    if store["config"].get("embedding_model_dims") is None:
        store["config"]["embedding_model_dims"] = dims if dims is not None else rules.DEFAULT_DIMS
        why = "as the embedder gives" if dims is not None else "which was the default"
        shown = dims if isinstance(dims, int) else rules.DEFAULT_DIMS if dims is None else "the embedder's variable"
        notes.add("pinned", key, f"{shown}, {why}")
    found, given = store["config"]["embedding_model_dims"], dims if dims is not None else real
    if isinstance(found, int) and isinstance(given, int) and found != given:
        notes.add("check", key, f"the store is made for {found} dimensions, and the embedder gives {given}")


def _fit_index(config: dict[str, Any], notes: Notes) -> None:
    dims = config.get("embedding_model_dims")
    if isinstance(dims, int) and dims > rules.HNSW_DIMS_MAX and config.get("hnsw") is not False:
        config["hnsw"] = False
        notes.add("changed", f"{_PATH}.hnsw", f"off: pgvector indexes {rules.HNSW_DIMS_MAX:,} dimensions at most")
