"""
Embed on this machine: with `fastembed` or `sentence-transformers` where one is installed, or with the built-in embedder.

Both libraries cut a text off where the model's window ends (256 or 512 tokens for most small models) and say nothing of
it; a model with a larger window is the only help. The built-in one, `memharbor-hash`, reads a text whole, but knows words
and no meaning: it is for tests and dry runs.
Sources: fastembed, Supported Models; sentence-transformers, SentenceTransformer.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memharbor import embedder
from memharbor.errors import ConfigError, EmbeddingError
from memharbor.migrate.embedding.cache import EmbeddingCache, pack, unpack
from memharbor.migrate.embedding.model import Embedding, EmbeddingRefusal
from memharbor.settings import EMBEDDING_DIMS_MAX

HASH_MODEL = "memharbor-hash"
INSTALL_COMMAND = "pip install 'memharbor[local]'"
_BATCH_TEXTS = 64

_Encode = Callable[[list[str]], Iterable[Iterable[Any]]]


class LocalEmbedder:
    """
    Embed on this machine; nothing leaves it, but a model may be fetched once.

    Args:
        model: `memharbor-hash`, or a model that `fastembed` or `sentence-transformers` knows.
        dims: Of its embeddings; the built-in one makes any.
        cache: Where embeddings are kept; `None` to make them anew each time.

    Raises:
        ConfigError: Neither library is installed, or none of them knows the model, or it has other dimensions.
    """

    def __init__(self, model: str, dims: int, *, cache: EmbeddingCache | None = None) -> None:
        self.model = model
        self.dims = dims
        self._cache = cache
        self._encode = _find_encoder(model, dims)

    def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """
        Embed texts; see `Embedder`.

        Raises:
            EmbeddingError: The model gives another number of embeddings or of values than it should.
        """
        unique = list(dict.fromkeys(text for text in texts if text.strip()))
        found: dict[str, Embedding] = dict(self._cache.find(unique)) if self._cache else {}
        missing = [text for text in unique if text not in found]
        for start in range(0, len(missing), _BATCH_TEXTS):
            batch = missing[start : start + _BATCH_TEXTS]
            made = dict(zip(batch, self._encoded(batch), strict=True))
            if self._cache:
                self._cache.store(
                    (text, vector) for text, vector in made.items() if not isinstance(vector, EmbeddingRefusal)
                )
            found |= made
        empty = EmbeddingRefusal("no-text", "it has no text to embed")
        return [found.get(text, empty) for text in texts]

    def _encoded(self, batch: list[str]) -> list[Embedding]:
        vectors = [checked_vector(list(vector)) for vector in self._encode(batch)]
        lengths = {len(vector) for vector in vectors if not isinstance(vector, EmbeddingRefusal)} - {self.dims}
        if len(vectors) != len(batch) or lengths:
            raise EmbeddingError(
                f"`{self.model}` gave {len(vectors)} embeddings of {sorted(lengths) or self.dims} dimensions"
                f" for {len(batch)} texts; {self.dims} dimensions were expected"
            )
        return vectors


def checked_vector(values: Sequence[Any]) -> Embedding:
    """
    Make float32 values of an embedding, or say why it cannot be used.

    >>> checked_vector([1, -0.5]), checked_vector([0.0, 0.0]).reason
    ((1.0, -0.5), 'bad-vector')
    """
    try:
        vector = unpack(pack([float(value) for value in values]))
    except (OverflowError, TypeError, ValueError):
        return EmbeddingRefusal("bad-vector", "its embedding has a value that is no float32")
    if not all(map(math.isfinite, vector)):
        return EmbeddingRefusal("bad-vector", "its embedding has a value that is not finite")
    if not any(vector):
        return EmbeddingRefusal("bad-vector", "its embedding is all zeros")
    return vector


def _find_encoder(model: str, dims: int) -> _Encode:
    if model == HASH_MODEL:
        if not 1 <= dims <= EMBEDDING_DIMS_MAX:
            raise ConfigError(f"`{model}` makes embeddings of 1 to {EMBEDDING_DIMS_MAX} dimensions, not of {dims}")
        return lambda texts: [embedder.embed(text, dims) for text in texts]
    fastembed = _find_library("fastembed")
    if fastembed is not None:
        described = {each["model"]: each for each in fastembed.TextEmbedding.list_supported_models()}
        if model in described:
            _check_dims(model, int(described[model]["dim"]), dims)
            loaded = fastembed.TextEmbedding(model_name=model)
            return lambda texts: loaded.embed(texts, batch_size=_BATCH_TEXTS)
    transformers = _find_library("sentence_transformers")
    if transformers is not None:
        try:
            found = transformers.SentenceTransformer(model)
        except (OSError, ValueError) as exc:
            raise ConfigError(f"`{model}` cannot be loaded: {exc}", hint="check its name on huggingface.co") from exc
        _check_dims(model, int(found.get_sentence_embedding_dimension()), dims)
        return lambda texts: found.encode(texts, batch_size=_BATCH_TEXTS, show_progress_bar=False)
    if fastembed is not None:
        raise ConfigError(f"`fastembed` does not know `{model}`", hint="pip install sentence-transformers")
    raise ConfigError(
        f"`{model}` needs `fastembed` or `sentence-transformers`, and neither is installed",
        hint=(INSTALL_COMMAND, "pip install sentence-transformers"),
    )


def _find_library(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise ConfigError(f"`{name}` is installed, but `{exc.name}`, which it needs, is not") from exc
        return None


def _check_dims(model: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(f"`{model}` makes embeddings of {found} dimensions, not of {wanted}")
