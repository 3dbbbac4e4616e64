"""
What an embedder is, which models are known, whether one fits a schema, and what it will cost. Pure.

Prices are OpenAI's, in US dollars for a million tokens, read on 2026-11-21. Sources: developers.openai.com, model pages of
text-embedding-3-large and -small; for ada-002, which has no page there any more, vercel.com/ai-gateway/models.
Other limits: OpenAI API reference, Create embeddings, and OpenAI guide, Embeddings (vectors are of length one).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memharbor.errors import ConfigError, StateRefusedError

PRICES_READ_ON = "2026-11-21"
REEMBED_COMMAND = "memharbor migrate embed --filter all"
# English has about four bytes a token. Other scripts have fewer, so that this leans to the high side for them.
_ASCII_BYTES_PER_TOKEN = 4
_OTHER_BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class EmbeddingRefusal:
    """
    Why a text has no embedding.

    Args:
        reason: A code of `memharbor.migrate.reasons`.
        detail: What is wrong with it, for a person.
    """

    reason: str
    detail: str


Embedding = tuple[float, ...] | EmbeddingRefusal


class Embedder(Protocol):
    """Makes embeddings of texts."""

    @property
    def model(self) -> str:
        """Which model it is: embeddings of two models cannot be compared."""

    @property
    def dims(self) -> int:
        """How many values an embedding has."""

    def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """
        Embed texts: one answer for each, in their order; values are exactly float32.

        Raises:
            EmbeddingError: The endpoint fails, or answers with the wrong shape. What it answered before is kept.
            ConfigError: It refuses the key, or does not know the model.
        """


@dataclass(frozen=True)
class KnownModel:
    """
    A model whose properties are known.

    Args:
        dims: Of its embeddings, where they are not shortened.
        is_shortened: Whether it makes shorter ones on request.
        usd_per_million_tokens: Its price.
        source: Where the price is from.
    """

    dims: int
    is_shortened: bool
    usd_per_million_tokens: float
    source: str


_MODEL_PAGE = "developers.openai.com/api/docs/models/text-embedding-3-large"
KNOWN_MODELS: Mapping[str, KnownModel] = {
    "text-embedding-3-small": KnownModel(1536, True, 0.02, _MODEL_PAGE),
    "text-embedding-3-large": KnownModel(3072, True, 0.13, _MODEL_PAGE),
    "text-embedding-ada-002": KnownModel(1536, False, 0.10, "vercel.com/ai-gateway/models/text-embedding-ada-002"),
}


@dataclass(frozen=True)
class Estimate:
    """
    What embedding will take, before it is done.

    Args:
        tokens: About how many.
        usd: About what they cost; `None` where nobody said a price.
        price_source: Where the price is from; `None` where there is none.
    """

    tokens: int
    usd: float | None
    price_source: str | None


def find_model(model: str) -> KnownModel | None:
    """
    Find a model by its name, with or without its maker's before it.

    >>> find_model("openai/text-embedding-3-small").dims
    1536
    """
    return KNOWN_MODELS.get(model.rpartition("/")[2])


def check_fit(
    model: str,
    dims: int,
    *,
    schema_dims: int,
    schema_distance: str,
    recorded_model: str | None = None,
    distance: str | None = None,
) -> None:
    """
    Refuse embeddings that do not fit where they are to go, before any is asked for.

    Args:
        model: That is to make them.
        dims: That they are to have.
        schema_dims: Of the schema's embeddings.
        schema_distance: By which the schema compares them: `cosine`, `l2` or `inner_product`.
        recorded_model: That made those which are there; `None` where there are none, or nobody knows.
        distance: By which the model's maker says they are to be compared; `None` for any, which is so where they have
            length one. Models of sentence-transformers with `-dot-` in their name are compared by inner product.

    Raises:
        ConfigError: They have other dimensions, or are compared by another distance.
        StateRefusedError: Another model made those which are there.
    """
    known = find_model(model)
    if dims != schema_dims:
        raise ConfigError(
            f"embeddings of {dims} dimensions do not fit the schema, which has {schema_dims}",
            hint=f"pass `--dims {schema_dims}`, or another model, or roll out a stack with `embedding_dims` {dims}",
        )
    if known is not None and (dims > known.dims or (dims < known.dims and not known.is_shortened)):
        shorter = "at most " if known.is_shortened else ""
        raise ConfigError(f"`{model}` makes embeddings of {shorter}{known.dims} dimensions, not of {dims}")
    wanted = distance or ("inner_product" if "-dot-" in model else None)
    if wanted is not None and wanted != schema_distance:
        raise ConfigError(
            f"embeddings of `{model}` are compared by {wanted}, and the schema compares by {schema_distance}",
            hint=f"use a model for {schema_distance}, or roll out a stack with `embedding_distance` {wanted}",
        )
    if recorded_model is not None and recorded_model != model:
        raise StateRefusedError(
            f"the embeddings there were made by `{recorded_model}`, and those of `{model}` cannot be compared with them",
            hint=f"{REEMBED_COMMAND} --model {model}",
        )


def estimate_tokens(text: str) -> float:
    """
    Estimate the tokens of a text without a tokenizer.

    >>> estimate_tokens("Alice likes hiking in the Alps."), estimate_tokens("東京")
    (7.75, 3.0)
    """
    size_bytes = len(text.encode("utf-8", "surrogatepass"))
    ascii_bytes = sum(map(str.isascii, text)) if not text.isascii() else size_bytes
    return ascii_bytes / _ASCII_BYTES_PER_TOKEN + (size_bytes - ascii_bytes) / _OTHER_BYTES_PER_TOKEN


def estimate(
    sample: Iterable[str],
    model: str,
    *,
    text_count: int | None = None,
    usd_per_million_tokens: float | None = None,
) -> Estimate:
    """
    Estimate what it takes to embed texts.

    Args:
        sample: Some of the texts, or all of them.
        model: That is to embed them.
        text_count: How many there are in all; those of the sample by default.
        usd_per_million_tokens: The price, where the caller knows a better one than the table.

    >>> estimate(["Alice likes hiking in the Alps."] * 10, "text-embedding-3-small", text_count=1_000_000).usd
    0.155
    """
    sampled = [max(1.0, estimate_tokens(text)) for text in sample]
    count = len(sampled) if text_count is None else text_count
    tokens = math.ceil(math.fsum(sampled) * count / len(sampled)) if sampled else 0
    return estimate_cost(tokens, model, usd_per_million_tokens=usd_per_million_tokens)


def estimate_cost(tokens: float, model: str, *, usd_per_million_tokens: float | None = None) -> Estimate:
    """
    Estimate what some tokens cost.

    Args:
        tokens: About how many.
        model: That is to embed them.
        usd_per_million_tokens: The price, where the caller knows a better one than the table.

    >>> estimate_cost(1_000_000, "text-embedding-3-small").usd
    0.02
    """
    known, count = find_model(model), math.ceil(tokens)
    price, source = usd_per_million_tokens, "the caller"
    if price is None and known is not None:
        price, source = known.usd_per_million_tokens, f"{known.source}, {PRICES_READ_ON}"
    if price is None:
        return Estimate(count, None, None)
    return Estimate(count, count * price / 1_000_000, source)
