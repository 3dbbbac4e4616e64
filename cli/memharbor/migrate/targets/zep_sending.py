"""
Send pieces to Zep in batches: a draft is filled, and then processed. What is in doubt never comes twice.

Nothing of a draft is in a graph before `process`, so a draft in doubt is deleted and made again. Whether `process` was
heard is told by the batch's status. What a batch could not ingest is looked for, and sent again by the next run.
Sources: zep-cloud 4.0.1 `batch`; help.getzep.com, changelog of 2026-06-04, 2026-08-20 and 2026-11-08.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from memharbor.errors import ConnectError, SourceDataError, StateRefusedError
from memharbor.migrate.http import LostAnswerError, words_of
from memharbor.migrate.targets.zep_client import NOT_ALLOWED, REFUSED, ZepClient
from memharbor.migrate.targets.zep_mapping import Piece
from memharbor.migrate.targets.zep_state import ZepState

ITEMS_PER_CALL = 500
ATTEMPTS = 8
AGAIN = "run the same command again: what is there is not written twice"
STATE = "memharbor_state"
_GOING = ("queued", "processing")
_FAILED = ("failed", "canceled")


class BatchesRefusedError(Exception):
    """The account may not make batches."""


class Batches:
    """
    The batches of one state.

    Args:
        http: The service.
        state: Where they are noted.
    """

    def __init__(self, http: ZepClient, state: ZepState) -> None:
        self._http, self._state = http, state

    def settle(self) -> None:
        """
        Learn what became of the batches of earlier runs: drafts are thrown away, what failed is in doubt again.

        Raises:
            ConnectError: The service cannot be reached.
        """
        batches = self._state.batches()
        if not batches and not self._state.count_users():
            self._check_others()
        drafts = [batch for batch, status in batches if status in ("making", "draft")]
        if any(status == "making" for _, status in batches):
            # A draft may have been made without our having heard of it.
            for each in list(self._http.batches("draft")):
                metadata = each.get("metadata")
                if isinstance(metadata, Mapping) and metadata.get(STATE) == self._state.id:
                    self._http.delete_batch(str(each.get("uuid")))
        for batch, status in batches:
            if status == "making":
                self._state.drop_batch(batch)
            else:
                self._settle(batch, is_draft=batch in drafts)

    def _check_others(self) -> None:
        """A state that knows nothing cannot know what a batch of another one is about to bring."""
        for status in _GOING:
            for each in self._http.batches(status):
                metadata = each.get("metadata")
                if isinstance(metadata, Mapping) and metadata.get(STATE):
                    raise StateRefusedError(
                        f"a batch of another migration is {status} there, and nothing here knows what it brings",
                        hint="wait until it has ended, or use the folder of that migration",
                    )

    def _settle(self, batch: str, *, is_draft: bool) -> None:
        status = self._http.find_batch_status(batch)
        if status == "draft" or (status is None and is_draft):
            if status is None or self._http.delete_batch(batch):
                self._state.drop_batch(batch)
            else:
                self._state.note_batch(batch, "sent")
        elif status in _GOING:
            self._state.note_batch(batch, "sent")
        else:
            self._end(batch, status)

    def _end(self, batch: str, status: str | None) -> None:
        """Note what a batch came to that goes no further; it may be gone."""
        if status is None or status == "invalid":
            with self._state.transaction():
                self._state.doubt_batch(batch)
                self._state.note_batch(batch, "ended")
            return
        with self._state.transaction():
            for position, item in enumerate(self._http.batch_items(batch)):
                at = item.get("sequence_index")
                at = at if isinstance(at, int) else position
                if item.get("status") in _FAILED:
                    self._state.doubt_item(batch, at)
                elif item.get("episode_uuid"):
                    self._state.note_item(batch, at, str(item["episode_uuid"]))
            self._state.note_batch(batch, "ended")

    def send(self, items: Sequence[tuple[Piece, Mapping[str, Any]]]) -> tuple[dict[tuple[str, int], str], list[Piece]]:
        """
        Send pieces in one batch.

        Args:
            items: Each piece, and how it is spelled as an item.

        Returns:
            Which pieces were refused, and why; and those that must go one by one, since a whole call was refused.

        Raises:
            BatchesRefusedError: The account may not; nothing was sent.
            ConnectError: The service cannot be reached.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                batch = self._create()
                refused = self._fill(batch, items)
            except LostAnswerError as exc:
                self.settle()
                if attempt >= ATTEMPTS:
                    raise ConnectError(f"{exc.message}, {attempt} times", hint=AGAIN) from exc
                self._http.pause(attempt)
                continue
            if refused is not None and len(refused) < len(items) and self._process(batch):
                self._state.note_batch(batch, "sent")
                return refused, []
            if not self._http.delete_batch(batch):
                self._state.note_batch(batch, "sent")  # it was taken after all
                return refused or {}, []
            self._state.drop_batch(batch)
            if refused is not None and len(refused) == len(items):
                return refused, []
            return {}, [piece for piece, _ in items]

    def _create(self) -> str:
        token = str(uuid4())
        self._state.note_batch(token, "making")
        body = {"metadata": {STATE: self._state.id}}
        answer = self._http.write("/batches", body, token, allow=NOT_ALLOWED)
        if answer.status in NOT_ALLOWED:
            self._state.drop_batch(token)
            raise BatchesRefusedError
        batch = answer.data.get("uuid") if isinstance(answer.data, Mapping) else None
        if not batch:
            raise SourceDataError(f"`{self._http.base_url}/batches` answers no batch")
        with self._state.transaction():
            self._state.note_batch(str(batch), "draft")
            self._state.note_batch(token, "ended")
        return str(batch)

    def _fill(self, batch: str, items: Sequence[tuple[Piece, Mapping[str, Any]]]) -> dict[tuple[str, int], str] | None:
        """Add the items; say which were refused, or nothing where a whole call was."""
        refused: dict[tuple[str, int], str] = {}
        position = 0
        for start in range(0, len(items), ITEMS_PER_CALL):
            chunk = items[start : start + ITEMS_PER_CALL]
            path = f"/batches/{quote(batch, safe='')}/items"
            answer = self._http.write(path, {"items": [item for _, item in chunk]}, str(uuid4()), allow=(409, *REFUSED))
            if answer.status in (409, *REFUSED):
                return None
            data = answer.data if isinstance(answer.data, Mapping) else {}
            rejected = {
                index: words_of(each.get("reason") or "rejected")
                for each in data.get("rejected_items") or ()
                if isinstance(each, Mapping) and isinstance(index := each.get("index"), int)
            }
            added = [piece for index, (piece, _) in enumerate(chunk) if index not in rejected]
            refused |= {piece.key: rejected[index] for index, (piece, _) in enumerate(chunk) if index in rejected}
            rows = [
                (*piece.key, piece.digest, place)
                for piece, place in zip(added, _places(data, position, len(added)), strict=True)
            ]
            position += len(added)
            with self._state.transaction():
                self._state.note_batched(batch, rows)
        return refused

    def _process(self, batch: str) -> bool:
        """Have a draft processed; whether the service took it."""
        for attempt in range(1, ATTEMPTS + 1):
            with suppress(LostAnswerError):
                path = f"/batches/{quote(batch, safe='')}/process"
                answer = self._http.write(path, None, str(uuid4()), allow=(402, 409, *REFUSED))
                if 200 <= answer.status < 300:
                    return True
                if answer.status != 409:
                    return False
            status = self._http.find_batch_status(batch)
            if status not in (None, "draft", "invalid"):
                return True
            self._http.pause(attempt)
        raise ConnectError(f"the batch `{batch}` is not processed, {ATTEMPTS} times", hint=AGAIN)


def _places(data: Mapping[str, Any], start: int, count: int) -> list[int]:
    """Read at which positions of the batch items were added; one behind the other, where the answer does not say."""
    said = [each.get("sequence_index") for each in data.get("items") or () if isinstance(each, Mapping)]
    places = [place for place in said if isinstance(place, int)]
    return places if len(places) == count else list(range(start, start + count))
