"""
Speak the wire format of Zep Cloud's API v4: users, graph episodes, threads, batches, lists with cursors.

It goes through `memharbor.migrate.http` and not through the SDK `zep-cloud`. The SDK sends a write again after any lost
answer; whether that doubles it depends on how long the service keeps an idempotency key, which is documented nowhere.
It caps the pause that a service may ask for, and it is one more dependency to pin (its majors removed what older ones
had). Paths, bodies and field names are those of `zep-cloud` 4.0.1.
Sources: zep-cloud 4.0.1; help.getzep.com, SDK reference v4 and changelog 2026 (batches, limits of filters and pages).
Nobody has run this against the live service; `tests/zep_server.py` says what is assumed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import SecretStr

from memharbor.errors import ConfigError, SourceDataError
from memharbor.migrate.http import Answer, HttpClient
from memharbor.migrate.key import find_key

ZEP_URL = "https://api.getzep.com/api/v4"
KEY_VARIABLE = "ZEP_API_KEY"  # pragma: allowlist secret
URL_VARIABLE = "ZEP_API_URL"
# What a request may be answered with that is wrong in itself, and not with the service or the key.
REFUSED = (400, 413, 422)
# What an account answers that may not do something; 404 where the deployment does not know it.
NOT_ALLOWED = (402, 403, 404)
_EPISODES_PAGE, _BATCH_PAGE = 100, 200
_FILTER_VALUES = 200


class ZepClient(HttpClient):
    """
    A client of one project of Zep; a context manager.

    Args:
        key: The key of the project.
        base_url: Up to `/api/v4`.
        options: As `HttpClient` takes them.

    Raises:
        ConfigError: The address or the key is none, or the key would go over an open network in the clear.
    """

    def __init__(self, key: SecretStr, base_url: str = ZEP_URL, **options: Any) -> None:
        super().__init__(base_url, key=key, key_variable=KEY_VARIABLE, scheme="Api-Key", **options)
        self._idempotency_key: str | None = None
        self._client.event_hooks = {"request": [self._stamp]}

    def write(self, path: str, body: Any, idempotency_key: str, *, allow: Collection[int] = ()) -> Answer:
        """
        Send a write that must not be done twice.

        Args:
            path: Below the base address.
            body: JSON data.
            idempotency_key: The same for the same write, however often it is sent.
            allow: Statuses besides 200 to 299 that the caller wants to see.

        Raises:
            LostAnswerError: Nobody knows whether it was done.
            ConnectError: The service cannot be reached.
            ConfigError: It refuses the key.
        """
        self._idempotency_key = idempotency_key
        try:
            return self.request("POST", path, body=body, allow=allow, once=True)
        finally:
            self._idempotency_key = None

    def find_project(self) -> str:
        """Find the UUID of the key's project; empty where the key may not ask for it."""
        answer = self.request("GET", "/project", allow=NOT_ALLOWED)
        found = answer.data if answer.status == 200 and isinstance(answer.data, Mapping) else {}
        return str(found.get("uuid") or "")

    def find_user(self, user_id: str) -> tuple[str, str] | None:
        """Find the UUIDs of a user and of the user's graph by our name of the user."""
        answer = self.request("POST", "/users/lookup", body={"user_id": user_id}, allow=(404, *REFUSED))
        return None if answer.status != 200 else user_uuids(answer, "/users/lookup")

    def episodes(self, owner_uuid: str, record_ids: Sequence[str] = (), name: str = "") -> Iterator[Mapping[str, Any]]:
        """
        List the episodes of a user, also those that came as messages.

        Args:
            owner_uuid: UUID of the user or of the graph.
            record_ids: Only those with one of these values in the metadata; empty for all.
            name: Of the metadata's key.
        """
        path = f"/graphs/{quote(owner_uuid, safe='')}/episodes/list"
        if not record_ids:
            yield from self._pages("POST", path, _EPISODES_PAGE, body={})
        for start in range(0, len(record_ids), _FILTER_VALUES):
            values = list(record_ids[start : start + _FILTER_VALUES])
            wanted = {"property_name": name, "operator": "in", "value": values}
            body = {"filters": {"metadata_filters": {"type": "and", "filters": [wanted]}}}
            yield from self._pages("POST", path, _EPISODES_PAGE, body=body)

    def messages(self, thread_uuid: str, *, allow: Collection[int] = ()) -> Iterator[Mapping[str, Any]]:
        """List the messages of a thread; none where the answer has a status of `allow`."""
        return self._pages("GET", f"/threads/{quote(thread_uuid, safe='')}/messages", _EPISODES_PAGE, allow=allow)

    def threads(self, user_uuid: str) -> Iterator[Mapping[str, Any]]:
        """List the threads of a user."""
        return self._pages("GET", "/threads", _EPISODES_PAGE, params={"user_uuid": user_uuid})

    def batches(self, status: str) -> Iterator[Mapping[str, Any]]:
        """List the batches of the project that have a status; none where the account may not."""
        return self._pages("GET", "/batches", _BATCH_PAGE, params={"status": status}, allow=NOT_ALLOWED)

    def batch_items(self, batch: str) -> Iterator[Mapping[str, Any]]:
        """List the items of a batch, in the order in which they were added."""
        return self._pages("GET", f"/batches/{quote(batch, safe='')}/items", _BATCH_PAGE)

    def find_batch_status(self, batch: str) -> str | None:
        """Find how far a batch is; `None` where there is none."""
        path = f"/batches/{quote(batch, safe='')}"
        answer = self.request("GET", path, allow=NOT_ALLOWED)
        if answer.status != 200:
            return None
        if not isinstance(answer.data, Mapping) or not answer.data.get("status"):
            raise SourceDataError(f"`{self.base_url}{path}` answers no batch")
        return str(answer.data["status"])

    def delete_batch(self, batch: str) -> bool:
        """Throw a draft away, with all that was added to it; not where it is processed already."""
        return self.request("DELETE", f"/batches/{quote(batch, safe='')}", allow=(404, 409)).status != 409

    def _stamp(self, request: httpx.Request) -> None:
        if self._idempotency_key is not None:
            request.headers["Idempotency-Key"] = self._idempotency_key

    def _pages(
        self,
        method: str,
        path: str,
        size: int,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        allow: Collection[int] = (),
    ) -> Iterator[Mapping[str, Any]]:
        cursor, seen = "", set[str]()
        while True:
            query = {"page_size": size, **(params or {})} | ({"cursor": cursor} if cursor else {})
            answer = self.request(method, path, params=query, body=body, allow=allow)
            if answer.status in allow:
                return
            data = answer.data
            items = data.get("items") if isinstance(data, Mapping) else None
            if not isinstance(data, Mapping) or not isinstance(items, list | None):
                raise SourceDataError(f"`{self.base_url}{path}` answers no list")
            yield from (item for item in items or () if isinstance(item, Mapping))
            cursor = str(data.get("next_cursor") or "")
            if not cursor:
                return
            if cursor in seen:
                raise SourceDataError(f"`{self.base_url}{path}` answers the same page again and again")
            seen.add(cursor)


def connect(environment: Mapping[str, str] | None = None, url: str | None = None, **options: Any) -> ZepClient:
    """
    Make a client with the key of the environment.

    Args:
        environment: Where ZEP_API_KEY or ZEP_API_KEY_FILE is, and perhaps ZEP_API_URL; the process's own by default.
        url: Up to `/api/v4`; goes before ZEP_API_URL.
        options: As `HttpClient` takes them.

    Raises:
        ConfigError: The key is not given, or the address is none.
    """
    environment = os.environ if environment is None else environment
    key = find_key(KEY_VARIABLE, environment)
    if key is None:
        raise ConfigError(
            "the key of Zep Cloud is not given", hint=f"export {KEY_VARIABLE}=…, so that it is on no command line"
        )
    return ZepClient(key, url or environment.get(URL_VARIABLE) or ZEP_URL, **options)


def user_uuids(answer: Answer, path: str) -> tuple[str, str]:
    """
    Read the UUIDs of a user and of its graph; either addresses the graph.

    Raises:
        SourceDataError: The answer has none.
    """
    data = answer.data if isinstance(answer.data, Mapping) else {}
    if not data.get("uuid"):
        raise SourceDataError(f"`{path}` answers no user")
    return str(data["uuid"]), str(data.get("graph_uuid") or data["uuid"])
