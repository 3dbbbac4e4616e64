"""
Write memories into a project of Zep Cloud, each once, however often this runs and wherever it was interrupted.

One Zep user for each user; each memory one graph episode of text with the instant it was made at, or, where it was said
in a conversation and that is wanted, one message of a thread. Many go as a batch: a draft that is filled and then
processed. A draft whose filling is in doubt is thrown away and made again, since nothing of it is in a graph yet. Few, or
all where the account has no batches, go one by one: each is noted in the state before it is sent, and one whose answer
was lost is looked for by its id in the metadata before it is sent again.

What the service does not take: entities, relationships and changes (it makes its own), embeddings, memories that are
paused, archived or deleted here, memories without a user. It reads facts out of the episodes in its own time and words.
The wire format: `memharbor.migrate.targets.zep_client`, which also says why the SDK is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from memharbor.errors import ConnectError, SourceDataError, UsageError
from memharbor.migrate.http import Answer, LostAnswerError, words_of
from memharbor.migrate.record import Record
from memharbor.migrate.targets.platform import Outcome
from memharbor.migrate.targets.zep_client import REFUSED, ZepClient, user_uuids
from memharbor.migrate.targets.zep_mapping import (
    ID,
    MESSAGE_CHARACTERS,
    Mapped,
    Piece,
    Speller,
    There,
    found_in,
    impossible,
)
from memharbor.migrate.targets.zep_sending import AGAIN, ATTEMPTS, Batches, BatchesRefusedError
from memharbor.migrate.targets.zep_state import Sent, User, ZepState

MESSAGES_PER_CALL = 30
BATCH_ITEMS = 5_000
BATCH_ITEMS_MAX = 50_000
# A batch costs three requests and more, and is read later than single ones.
_BATCH_FROM = 10


@dataclass
class _Entry:
    """A memory on its way: what is known of it, what is still to be sent."""

    record_id: str
    outcome: Outcome | None = None
    todo: list[Piece] = field(default_factory=list)


class ZepTarget:
    """
    Write to one project.

    Args:
        http: The service, with its key.
        state_folder: Where it is noted what is there; each project has one.
        mapping: Roles, types, metadata.
        threads: Whether what was said in a conversation becomes a message of a thread.
        message_characters: The longest message that the account may send.
        batch_items: Pieces that are held in memory and sent in one batch; 0 for no batches.

    Raises:
        UsageError: A number is out of its range.
    """

    def __init__(
        self,
        http: ZepClient,
        state_folder: Path,
        mapping: Mapped | None = None,
        *,
        threads: bool = False,
        message_characters: int = MESSAGE_CHARACTERS,
        batch_items: int = BATCH_ITEMS,
    ) -> None:
        if not 0 <= batch_items <= BATCH_ITEMS_MAX:
            raise UsageError(f"a batch has {BATCH_ITEMS_MAX:,} items at most, not {batch_items:,}")
        self.http = http
        self._folder = state_folder
        self.speller = Speller(mapping or Mapped(), threads=threads, message_characters=message_characters)
        self._batch_items = batch_items
        self._has_batches = batch_items > 0
        self._refused_users: dict[str, str] = {}

    def write(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """
        Write records, and say of each what became of it, in their order.

        Args:
            records: Memories, streamed; those of several users may be mixed.

        Raises:
            ConnectError: The service cannot be reached, after retries; what was said so far holds.
            ConfigError: It refuses the key.
            SourceDataError: An answer is not what the API describes.
            StateRefusedError: The state is in use, or of another project.
        """
        with self.open_state() as state:
            Batches(self.http, state).settle()
            entries: list[_Entry] = []
            pieces, ids = 0, set[str]()
            for record in records:
                most = self._batch_items if self._has_batches else MESSAGES_PER_CALL
                if str(record.id) in ids or len(entries) >= most:
                    yield from self._flush(state, entries)
                    entries, pieces, ids = [], 0, set()
                entry = self._entry(state, record)
                if entries and pieces + len(entry.todo) > most:
                    yield from self._flush(state, entries)
                    entries, pieces, ids = [], 0, set()
                entries.append(entry)
                pieces += len(entry.todo)
                ids.add(entry.record_id)
            yield from self._flush(state, entries)

    def open_state(self) -> ZepState:
        """
        Open the state, checked to be of the key's project.

        Raises:
            StateRefusedError: It is in use, or of another project.
        """
        state = ZepState(self._folder)
        try:
            state.bind(self.http.find_project())
        except BaseException:
            state.close()
            raise
        return state

    def ensure_user(self, user_id: str, profile: Mapping[str, Any] | None = None) -> str:
        """
        Make a user there, or find the one that is; a profile is only of one that is made.

        Args:
            user_id: Our name.
            profile: `email`, `first_name`, `last_name`, `metadata`.

        Returns:
            The UUID there.

        Raises:
            SourceDataError: The service does not take the name.
        """
        with self.open_state() as state:
            user = self._user(state, user_id, profile or {})
        if isinstance(user, str):
            raise SourceDataError(f"Zep does not take the user `{user_id}`: {user}")
        return user.uuid

    def _entry(self, state: ZepState, record: Record) -> _Entry:
        entry = _Entry(str(record.id))
        why = impossible(record)
        user = why or self._user(state, str(record.user_id), {})
        if isinstance(user, str):
            entry.outcome = Outcome(entry.record_id, "refused", user)
            return entry
        self.speller.note_left_behind(record)
        pieces = self.speller.pieces(record)
        known = self._known(state, entry.record_id, pieces)
        if any(sent.digest != pieces[0].digest for sent in known.values()):
            entry.outcome = Outcome(entry.record_id, "changed", "its other contents are there, and stay")
            return entry
        entry.todo = [piece for piece in pieces if piece.part not in known]
        if not entry.todo:
            entry.outcome = Outcome(entry.record_id, "same", self._there_id(state, entry.record_id))
        return entry

    def _known(self, state: ZepState, record_id: str, pieces: Sequence[Piece]) -> dict[int, Sent]:
        """Find what is there of a memory; what is in doubt is looked for."""
        known = state.find_pieces(record_id)
        if not any(sent.status == "sending" for sent in known.values()):
            return known
        there = self._look(state, pieces)
        for part, sent in known.items():
            found = there.get((record_id, part))
            if found is not None:
                state.note_written(record_id, part, found.digest, found.there_id)
            elif sent.status == "sending":
                state.forget_piece(record_id, part)
        return state.find_pieces(record_id)

    def _flush(self, state: ZepState, entries: Sequence[_Entry]) -> Iterator[Outcome]:
        todo = [piece for entry in entries for piece in entry.todo]
        refused: dict[tuple[str, int], str] = {}
        if self._has_batches and len(todo) >= _BATCH_FROM:
            threads = {p.key: self._thread(state, p.user_id, p.run_id) for p in todo if p.is_message}
            items = [(piece, self._item(state, piece, threads)) for piece in todo]
            try:
                refused, todo = Batches(self.http, state).send(items)
            except BatchesRefusedError:
                self._has_batches = False
        for group in _calls(todo):
            refused |= self._send(state, group)
        for entry in entries:
            why = next((refused[piece.key] for piece in entry.todo if piece.key in refused), None)
            if entry.outcome is None and why is not None:
                yield Outcome(entry.record_id, "refused", why)
            elif entry.outcome is None:
                yield Outcome(entry.record_id, "inserted", self._there_id(state, entry.record_id))
            else:
                yield entry.outcome

    def _there_id(self, state: ZepState, record_id: str) -> str:
        return next((sent.there_id for sent in state.find_pieces(record_id).values() if sent.there_id), "")

    def _item(self, state: ZepState, piece: Piece, threads: Mapping[tuple[str, int], str]) -> dict[str, Any]:
        """Spell a piece as an item of a batch."""
        if piece.is_message:
            return {"type": "thread_message", "thread_uuid": threads[piece.key], **piece.body}
        user = state.get_user(piece.user_id)
        return {"type": "graph_episode", "user_uuid": user.uuid, "data_type": "text", **piece.body}

    def _send(self, state: ZepState, group: Sequence[Piece]) -> dict[tuple[str, int], str]:
        """Send one episode, or some messages of one thread; say which were refused, and why."""
        left = list(group)
        attempt = 0
        while left:
            attempt += 1
            keys = [_key(state, piece.key, piece.digest, attempt) for piece in left]
            try:
                answer = self._post(state, left, keys[0])
            except LostAnswerError as exc:
                self.http.pause(attempt)
                there = self._look(state, left)
                for piece in left:
                    if piece.key in there:
                        state.note_written(*piece.key, there[piece.key].digest, there[piece.key].there_id)
                left = [piece for piece in left if piece.key not in there]
                if there and left:
                    state.forget_piece(*left[0].key)  # what is sent next is another write
                if left and attempt >= ATTEMPTS:
                    raise ConnectError(f"{exc.message}, {attempt} times", hint=AGAIN) from exc
                continue
            if answer.status in (*REFUSED, 404):
                for piece in left:
                    state.forget_piece(*piece.key)
                if len(left) > 1:  # one of them is to blame
                    return {key: why for piece in left for key, why in self._send(state, [piece]).items()}
                return {left[0].key: f"{answer.status} {words_of(answer.data)}".rstrip()}
            with state.transaction():
                for piece, there_id in zip(left, _there_ids(answer, len(left)), strict=True):
                    state.note_written(*piece.key, piece.digest, there_id)
            return {}
        return {}

    def _post(self, state: ZepState, pieces: Sequence[Piece], key: str) -> Answer:
        allow = (*REFUSED, 404)
        first = pieces[0]
        if first.is_message:
            thread = quote(self._thread(state, first.user_id, first.run_id), safe="")
            body: dict[str, Any] = {"messages": [piece.body for piece in pieces]}
            return self.http.write(f"/threads/{thread}/messages", body, key, allow=allow)
        user = state.get_user(first.user_id)
        path = f"/graphs/{quote(user.graph_uuid, safe='')}/episodes"
        return self.http.write(path, {"type": "text", **first.body}, key, allow=allow)

    def _look(self, state: ZepState, pieces: Sequence[Piece]) -> dict[tuple[str, int], There]:
        """Find out which pieces are there."""
        there: dict[tuple[str, int], There] = {}
        for user_id in dict.fromkeys(piece.user_id for piece in pieces):
            user = state.get_user(user_id)
            ids = sorted({piece.record_id for piece in pieces if piece.user_id == user_id and not piece.is_message})
            for episode in self.http.episodes(user.graph_uuid, ids, ID) if ids else ():
                there |= found_in(episode)
            runs = {piece.run_id for piece in pieces if piece.user_id == user_id and piece.is_message}
            for thread in filter(None, (state.find_thread(user_id, run_id) for run_id in sorted(runs))):
                for message in self.http.messages(thread):
                    there |= found_in(message)
        wanted = {piece.key for piece in pieces}
        return {key: found for key, found in there.items() if key in wanted}

    def _user(self, state: ZepState, user_id: str, profile: Mapping[str, Any]) -> User | str:
        """Find or make a user, and note what the service has of it already; or say why it cannot be."""
        user = state.find_user(user_id)
        if user is not None:
            return user  # it was listed before it was noted
        if user_id in self._refused_users:
            return self._refused_users[user_id]
        attempt = 0
        while user is None:
            attempt += 1
            found = self.http.find_user(user_id)
            if found is not None:
                user = User(*found)
                self._list(state, user_id, user)
                break
            key = _key(state, (f"user:{user_id}", 0), "", attempt)
            # What is lost is looked up again, above.
            with suppress(LostAnswerError):
                answer = self.http.write("/users", {"user_id": user_id, **profile}, key, allow=(409, *REFUSED))
                if answer.status in REFUSED:
                    state.forget_piece(f"user:{user_id}", 0)
                    why = self._refused_users[user_id] = f"{answer.status} {words_of(answer.data)}".rstrip()
                    return why
                if answer.status != 409:
                    user = User(*user_uuids(answer, "/users"))
                    break
            if attempt >= ATTEMPTS:
                raise ConnectError(f"the user `{user_id}` can neither be made nor found in Zep", hint=AGAIN)
            self.http.pause(attempt)
        with state.transaction():
            state.note_user(user_id, user)
            state.forget_piece(f"user:{user_id}", 0)
        return user

    def _list(self, state: ZepState, user_id: str, user: User) -> None:
        """Note what the service has of a user that this state did not make."""
        listed = [self.http.episodes(user.graph_uuid)]
        if self.speller.threads:
            listed += [self.http.messages(str(each.get("uuid"))) for each in self.http.threads(user.uuid)]
        with state.transaction():
            for item in chain.from_iterable(listed):
                for key, found in found_in(item).items():
                    state.note_written(*key, found.digest, found.there_id)
                    run_id = item["metadata"].get("run_id")
                    if item.get("thread_uuid") and run_id:
                        state.note_thread(user_id, str(run_id), str(item["thread_uuid"]))

    def _thread(self, state: ZepState, user_id: str, run_id: str) -> str:
        """Find or make the thread of a conversation."""
        thread = state.find_thread(user_id, run_id)
        if thread is not None:
            return thread
        user = state.get_user(user_id)
        name = f"thread:{user_id}:{run_id}"
        attempt = 0
        while thread is None:
            attempt += 1
            key = _key(state, (name, 0), "", attempt)
            try:
                answer = self.http.write("/threads", {"user_uuid": user.uuid}, key)
                thread = str(answer.data.get("uuid") or "") if isinstance(answer.data, Mapping) else ""
            except LostAnswerError as exc:
                if attempt >= ATTEMPTS:
                    raise ConnectError(f"{exc.message}, {attempt} times", hint=AGAIN) from exc
                self.http.pause(attempt)
                thread = self._empty_thread(state, user_id, user)
        if not thread:
            raise SourceDataError("`/threads` answers no thread")
        with state.transaction():
            state.note_thread(user_id, run_id, thread)
            state.forget_piece(name, 0)
        return thread

    def _empty_thread(self, state: ZepState, user_id: str, user: User) -> str | None:
        """Find a thread that was made without our having heard of it: it is not in the state, and empty."""
        ours = set(state.threads(user_id).values())
        for each in self.http.threads(user.uuid):
            thread = str(each.get("uuid") or "")
            if thread and thread not in ours and next(self.http.messages(thread), None) is None:
                return thread
        return None


def _key(state: ZepState, piece: tuple[str, int], digest: str, attempt: int) -> str:
    """Note a write, and choose the key it goes with; late another one, should the service keep a failure under the first."""
    if attempt > ATTEMPTS // 2:
        state.forget_piece(*piece)
    return state.intend(*piece, digest)


def _calls(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into calls: an episode alone, messages of one thread together."""
    group: list[Piece] = []
    for piece in pieces:
        fits = group and piece.is_message and (group[0].user_id, group[0].run_id) == (piece.user_id, piece.run_id)
        if group and not (fits and len(group) < MESSAGES_PER_CALL):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _there_ids(answer: Answer, count: int) -> list[str]:
    data = answer.data if isinstance(answer.data, Mapping) else {}
    made = data.get("messages") if isinstance(data.get("messages"), list) else [data.get("episode")]
    ids = [str(each.get("uuid") or "") if isinstance(each, Mapping) else "" for each in made or ()]
    return ids if len(ids) == count else [""] * count
