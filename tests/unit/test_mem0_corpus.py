from __future__ import annotations

import hashlib
import json

from tests import corpus


def test_the_corpus_is_twenty_thousand_different_memories_of_fifty_users() -> None:
    memories = corpus.memories()
    assert len(memories) == len({memory.id for memory in memories}) == len({memory.memory for memory in memories})
    assert len(memories) == corpus.ROW_COUNT == 20_000
    assert len({memory.user_id for memory in memories}) == 50


def test_one_user_is_heavy_and_the_others_are_not() -> None:
    counts = corpus.row_counts()
    assert {user: len(corpus.of_user(user)) for user in corpus.USERS[:3]} == {
        user: counts[user] for user in corpus.USERS[:3]
    }
    assert counts[corpus.HEAVY_USER] == 6_000
    assert 100 <= min(counts.values()) <= sorted(counts.values())[-2] < 2_000
    assert sum(counts.values()) == corpus.ROW_COUNT


def test_the_corpus_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for memory in corpus.memories():
        digest.update(json.dumps([str(memory.id), memory.payload], sort_keys=True).encode())
    assert digest.hexdigest()[:16] == "0c62889a1a390e51"  # pragma: allowlist secret


def test_memories_come_in_the_order_of_time_with_users_interleaved() -> None:
    memories = corpus.memories()
    assert all(before.created_at <= after.created_at for before, after in zip(memories, memories[1:], strict=False))
    assert len({memory.user_id for memory in memories[:1_000]}) == 50
