"""
The off-site copy: keep a second S3 place in step with the first store, and fill an empty first store from it.

The copy is one that pgBackRest can restore from at any instant: its lists (`backup.info`, `archive.info`) arrive after
all that they name. Copying never deletes: what is deleted in the first store stays in the copy until it is purged
there (`memharbor_custodian.keeping.purge`). A first store that is not the one that was copied is not followed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import md5
from typing import Any

from memharbor_custodian.errors import CustodianError, RefusedError
from memharbor_custodian.keeping import is_info
from memharbor_custodian.places import GoneError, Place, Stored, check_md5

OnProgress = Callable[[int, int, int], None]

# Each thread holds one part (16 MiB).
_THREADS = 4
_BATCH = 64
_SAVE_SECONDS = 60
_TRIES = 5
# Backup files and archived segments are written once. Many that change at once are not pgBackRest's work.
_CHANGED_MINIMUM, _CHANGED_SHARE = 20, 0.1


@dataclass
class CopyState:
    """
    What is known about the copy; it lies in the copy itself.

    Args:
        store: Identity of the store that was copied.
        as_of: When the first store was as the copy is now, ISO 8601; empty while the first copy is not complete.
        etags: By key, the ETags of source and copy, where they differ (uploads in parts).
    """

    store: str = ""
    as_of: str = ""
    objects: int = 0
    size_bytes: int = 0
    etags: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: bytes) -> CopyState:
        """Parse what `render` wrote; a damaged one counts as none, which only makes more work."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls()

    def render(self) -> bytes:
        """Write it as JSON."""
        return json.dumps(vars(self), separators=(",", ":"), sort_keys=True).encode()


@dataclass(frozen=True)
class Keys:
    """Where the custodian keeps its own records in either place: below the stack's records."""

    stack: str

    @property
    def identity(self) -> str:
        """Names the store; it is copied like everything else."""
        return f"memharbor/{self.stack}/custodian/store.json"

    @property
    def state(self) -> str:
        """The state of the copy; only there."""
        return f"memharbor/{self.stack}/custodian/copy.json"

    @property
    def backups(self) -> str:
        """Folder of pgBackRest's repository."""
        return f"pgbackrest/{self.stack}/"


class OffsiteCopy:
    """
    The first store and its copy.

    Args:
        store: The first store.
        offsite: The copy's place.
        stack: The stack's name.
    """

    def __init__(self, store: Place, offsite: Place, stack: str) -> None:
        self._store, self._offsite, self._keys = store, offsite, Keys(stack)

    def copy(
        self, *, now: datetime, dry_run: bool = False, accept_changes: bool = False, on_progress: OnProgress
    ) -> dict[str, Any]:
        """
        Bring the copy in step.

        Args:
            now: Aware; what the first store holds at this moment is in the copy afterwards.
            dry_run: Only count.
            accept_changes: Follow although many files changed that are written once.
            on_progress: Told the objects done, all objects to do, and the bytes done.

        Raises:
            RefusedError: The first store is another one than was copied, looks emptied or changed as a whole.
            CustodianError: A store failed; what was copied stays, and the next copy goes on from there.
        """
        for _ in range(_TRIES):
            with suppress(GoneError):  # deleted since it was listed: list again
                return self._copy_once(now, dry_run, accept_changes, on_progress)
        raise CustodianError("the backup store changes faster than it can be copied", hint="try again later")

    def _copy_once(self, now: datetime, dry_run: bool, accept_changes: bool, on_progress: OnProgress) -> dict[str, Any]:
        state = self.read_state()
        identity = self._check_identity(state, dry_run=dry_run)
        found, lists = self._list_store()
        copied = self._offsite.objects()
        copied.pop(self._keys.state, None)
        _check_not_emptied(found, copied)
        wanted = [each for each in found.values() if not is_same(each, copied.get(each.key), state)]
        data = sorted((each for each in wanted if each.key not in lists), key=lambda each: each.key)
        if not accept_changes:
            _check_not_changed(data, copied, self._keys.backups)
        report = {
            "objects": len(found),
            "bytes": sum(each.size_bytes for each in found.values()),
            "copied": len(wanted),
            "copied_bytes": sum(each.size_bytes for each in wanted),
        }
        if not dry_run:
            state.store = identity
            self._copy_data(data, state, on_progress)
            for each in wanted:
                if each.key in lists:
                    self._remember(state, each.key, each.etag, self._offsite.write(each.key, lists[each.key]))
            state.as_of, state.objects, state.size_bytes = now.isoformat(), report["objects"], report["bytes"]
            state.etags = {key: etags for key, etags in state.etags.items() if key in found or key in copied}
            self._offsite.write(self._keys.state, state.render())
        return {**report, "as_of": state.as_of or None}

    def fetch(
        self,
        *,
        replace: bool = False,
        dry_run: bool = False,
        settle_seconds: float = 0,
        on_progress: OnProgress,
    ) -> dict[str, Any]:
        """
        Fill the first store from its copy.

        What pgBackRest wrote into the first store since, an empty stanza with a key of its own and segments that only
        this key reads, is deleted; the store keeps its versions.

        Args:
            replace: Do it although the first store has backups.
            dry_run: Only count.
            settle_seconds: How long to wait for an archiving that was under way before its last files are deleted.
            on_progress: As for `copy`.

        Raises:
            RefusedError: The first store has backups, or the copy is not complete.
        """
        state = self.read_state()
        if not state.as_of:
            raise RefusedError("the off-site place holds no complete copy of this stack")
        present, copied = self._store.objects(), self._offsite.objects()
        copied.pop(self._keys.state, None)
        if not replace:
            self._check_replaceable(state, present, copied)
        wanted = [each for each in copied.values() if not is_same_back(each, present.get(each.key), state)]
        foreign = [key for key in present if key.startswith(self._keys.backups) and key not in copied]
        deleted = len(foreign)
        if not dry_run:
            # Its lists first: without them pgBackRest archives nothing under a key that nobody will have.
            self._store.delete([*(key for key in present if is_info(key)), *foreign])
            last = {key for key in copied if is_info(key)} | {self._keys.identity}
            data = sorted((each for each in wanted if each.key not in last), key=lambda each: each.key)
            self._fetch_data(data, state, on_progress)
            for key in sorted(last - {self._keys.identity}) + [self._keys.identity]:
                self._fetch_data([copied[key]] if key in copied else [], state, lambda *_: None)
            time.sleep(settle_seconds)
            late = [key for key in self._store.objects(self._keys.backups) if key not in copied]
            deleted += self._store.delete(late)
        size_bytes = sum(each.size_bytes for each in wanted)
        return {"objects": len(wanted), "bytes": size_bytes, "deleted": deleted, "as_of": state.as_of}

    def waiting(self) -> dict[str, Any]:
        """Count what the copy lacks now, and what it keeps that was deleted in the first store."""
        state, found, copied = self.read_state(), self._store.objects(), self._offsite.objects()
        copied.pop(self._keys.state, None)
        lacking = [each for each in found.values() if not is_same(each, copied.get(each.key), state)]
        return {
            "as_of": state.as_of or None,
            "objects": len(copied),
            "bytes": sum(each.size_bytes for each in copied.values()),
            "waiting_objects": len(lacking),
            "waiting_bytes": sum(each.size_bytes for each in lacking),
            "only_in_copy": len(copied.keys() - found.keys()),
        }

    def read_state(self) -> CopyState:
        """Read what is known about the copy."""
        return CopyState.parse(self._offsite.read(self._keys.state) or b"{}")

    def check(self) -> None:
        """
        Look whether the copy is of this very store.

        Raises:
            RefusedError: It is of another one.
        """
        self._check_identity(self.read_state(), dry_run=True)

    def _check_identity(self, state: CopyState, *, dry_run: bool) -> str:
        identity = self._identity()
        if state.store and identity != state.store:
            raise RefusedError(
                "the backup store is not the one that was copied"
                + ("" if identity else ": it is new, or its identity was deleted"),
                hint="run `memharbor backup offsite fetch` if the store was lost, else `memharbor backup undelete`",
            )
        if not identity:
            identity = str(uuid.uuid4())
            if not dry_run:
                self._store.write(self._keys.identity, json.dumps({"store": identity}).encode())
        return identity

    def _check_replaceable(self, state: CopyState, present: dict[str, Stored], copied: dict[str, Stored]) -> None:
        hint = "to replace what it has by the copy: memharbor backup offsite fetch --replace"
        # The identity arrives last: a store that has it, and was fetched, was fetched whole.
        if self._identity() == state.store:
            raise RefusedError("the backup store is the one that was copied: it is not lost", hint=hint)
        backups = [
            key
            for key, each in present.items()
            if is_backup(key, self._keys.backups) and not (key in copied and is_same(each, copied[key], state))
        ]
        if backups:
            raise RefusedError(f"the backup store has {len(backups)} backups of its own", hint=hint)

    def _identity(self) -> str:
        text = self._store.read(self._keys.identity)
        return str(json.loads(text)["store"]) if text else ""

    def _list_store(self) -> tuple[dict[str, Stored], dict[str, bytes]]:
        """List the first store together with the very lists of pgBackRest that fit what was listed."""
        for _ in range(_TRIES):
            found = self._store.objects()
            lists = {key: self._store.read(key) for key in found if is_info(key)}
            again = {key: each for key, each in self._store.objects().items() if is_info(key)}
            if all(again.get(key) == found[key] for key in lists) and None not in lists.values():
                # Whatever they name was there before they were written, and they did not change meanwhile.
                contents = {key: content for key, content in lists.items() if content is not None}
                for key, content in contents.items():
                    check_md5(self._store.name, key, found[key].etag, md5(content, usedforsecurity=False).hexdigest())
                return found, contents
        raise CustodianError("the backup store changes faster than it can be listed", hint="try again later")

    def _copy_data(self, data: list[Stored], state: CopyState, on_progress: OnProgress) -> None:
        saved_at = time.monotonic()

        def one(each: Stored) -> tuple[Stored, str, str]:
            return each, *self._offsite.copy_from(self._store, each.key)

        for each, etag, written in _in_threads(one, data, on_progress):
            self._remember(state, each.key, etag, written)
            if time.monotonic() - saved_at > _SAVE_SECONDS:
                # So that a copy that is interrupted goes on where it stopped.
                self._offsite.write(self._keys.state, state.render())
                saved_at = time.monotonic()

    def _fetch_data(self, data: list[Stored], state: CopyState, on_progress: OnProgress) -> None:
        def one(each: Stored) -> tuple[Stored, str, str]:
            known = state.etags.get(each.key, [""])[0]
            return each, *self._store.copy_from(self._offsite, each.key, known_etag=known)

        for _ in _in_threads(one, data, on_progress):
            pass

    @staticmethod
    def _remember(state: CopyState, key: str, etag: str, written: str) -> None:
        state.etags.pop(key, None)
        if etag != written:
            state.etags[key] = [etag, written]


def _in_threads(
    one: Callable[[Stored], tuple[Stored, str, str]], data: list[Stored], on_progress: OnProgress
) -> Iterable[tuple[Stored, str, str]]:
    """Work on several objects at a time; the first failure ends it once the others under way are through."""
    done = size_bytes = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for begin in range(0, len(data), _BATCH):
            for result in pool.map(one, data[begin : begin + _BATCH]):
                done, size_bytes = done + 1, size_bytes + result[0].size_bytes
                yield result
            on_progress(done, len(data), size_bytes)


def is_same(each: Stored, copied: Stored | None, state: CopyState) -> bool:
    """
    Tell whether the copy of an object is what was copied, and the object still what it was then.

    >>> source, copy = Stored("k", "a-2", 9), Stored("k", "b-1", 9)
    >>> is_same(source, copy, CopyState()), is_same(source, copy, CopyState(etags={"k": ["a-2", "b-1"]}))
    (False, True)
    """
    if copied is None or copied.size_bytes != each.size_bytes:
        return False
    return each.etag == copied.etag or state.etags.get(each.key) == [each.etag, copied.etag]


def is_same_back(each: Stored, present: Stored | None, state: CopyState) -> bool:
    """Tell whether the first store still has the very object that was copied."""
    return present is not None and is_same(present, each, state)


def is_backup(key: str, folder: str) -> bool:
    """
    Tell whether a key is the manifest of a backup that is complete, or was.

    >>> is_backup("pgbackrest/dev/backup/main/20260101-010101F/backup.manifest", "pgbackrest/dev/")
    True
    """
    return key.startswith(f"{folder}backup/") and key.endswith("/backup.manifest")


def _check_not_emptied(found: dict[str, Stored], copied: dict[str, Stored]) -> None:
    missing = sorted(key for key in copied if is_info(key) and key not in found)
    if missing:
        raise RefusedError(
            f"the backup store has lost `{missing[0]}`, which the copy has: somebody deletes backups",
            hint="memharbor backup undelete",
        )


def _check_not_changed(data: list[Stored], copied: dict[str, Stored], folder: str) -> None:
    before = sum(key.startswith(folder) for key in copied)
    changed = [each.key for each in data if each.key.startswith(folder) and each.key in copied]
    if len(changed) > max(_CHANGED_MINIMUM, before * _CHANGED_SHARE):
        raise RefusedError(
            f"{len(changed)} of {before} files changed that pgBackRest writes once, `{changed[0]}` among them:"
            " somebody overwrites backups",
            hint="memharbor backup undelete --at TIME, or: memharbor backup offsite copy --accept-changes",
        )
