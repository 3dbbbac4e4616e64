"""
Ask the installed Mem0 what it takes: the keys of each provider, and whether a whole configuration is valid.

Mem0 is an extra of this package (`memharbor[mem0]`): where it is missing, or another major release, nothing is asked and
that is said. No `Memory` is built, so that nothing is connected and nothing written.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import inspect
import os
import shutil
import tempfile
from typing import Any

from memharbor import versions
from memharbor.mem0_config.rules import PGVECTOR_KEYS, Component
from memharbor.mem0_config.values import Text


class Checker:
    """
    The installed Mem0, as far as it can be asked.

    Attributes:
        release: Its version; None where nothing can be asked.
        why_not: Why nothing can be asked.
    """

    def __init__(self) -> None:
        self.release: str | None = None
        self.why_not = ""
        try:
            found = _installed()
        except ImportError as exc:
            self.why_not = f"mem0ai is not installed ({exc.name or exc})"
            return
        if found.split(".")[0] != versions.MEM0AI.split(".")[0]:
            self.why_not = f"mem0ai {found} is installed, and not {versions.MEM0AI}"
            return
        self.release = found

    def keys(self, component: Component, provider: str) -> frozenset[str] | None:
        """List the keys that a provider's configuration takes; None where that is not known."""
        if component == "vector_store" and provider == "pgvector":
            return PGVECTOR_KEYS
        if self.release is None:
            return None
        try:
            return _keys(component, provider)
        except (ImportError, AttributeError, KeyError):  # of a client that is not installed, or an unknown provider
            return None

    def problems(self, config: dict[str, Any]) -> list[str]:
        """
        List what the installed Mem0 does not take about a configuration.

        Raises:
            ImportError: The client of the vector store is not installed.
        """
        if self.release is None:
            return []
        from mem0.configs.base import MemoryConfig
        from pydantic import ValidationError

        try:
            MemoryConfig(**copy.deepcopy(_placeholders(config)))
        except ValidationError as exc:
            errors = exc.errors(include_url=False, include_input=False, include_context=False)
            return [f"`{'.'.join(map(str, each['loc']))}`: {' '.join(each['msg'].split())}" for each in errors]
        except (ValueError, TypeError, AttributeError, KeyError) as exc:
            return [" ".join(str(exc).split())]
        return []


def _installed() -> str:
    """Import Mem0 without telemetry and without a folder in the home directory."""
    os.environ.setdefault("MEM0_TELEMETRY", "False")
    if not os.environ.get("MEM0_DIR"):
        folder = tempfile.mkdtemp(prefix="memharbor-mem0-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MEM0_DIR"] = folder
    import mem0

    return str(mem0.__version__)


def _keys(component: Component, provider: str) -> frozenset[str] | None:
    if component == "vector_store":
        from mem0.vector_stores.configs import VectorStoreConfig

        classes = VectorStoreConfig.__private_attributes__["_provider_configs"].default
        module = importlib.import_module(f"mem0.configs.vector_stores.{provider}")
        return frozenset(getattr(module, classes[provider]).model_fields)
    if component == "embedder":
        from mem0.configs.embeddings.base import BaseEmbedderConfig

        return _parameters(BaseEmbedderConfig)
    from mem0.utils.factory import LlmFactory, RerankerFactory

    if component == "llm":
        return _parameters(LlmFactory.provider_to_class[provider][1])
    return frozenset(RerankerFactory.provider_to_class[provider][1].model_fields)


def _parameters(kind: Any) -> frozenset[str] | None:
    parameters = inspect.signature(kind.__init__).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters) - {"self"}


def _placeholders(value: Any, key: str = "") -> Any:
    """Put values of the right shape where variables stand."""
    if isinstance(value, dict):
        return {name: _placeholders(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_placeholders(each, key) for each in value]
    if not isinstance(value, Text):
        return value
    if key == "connection_string":
        return "postgresql://name"
    if "url" in key or "endpoint" in key:
        return "http://name"
    return "1"  # a text, and what a number and a truth value are read from
