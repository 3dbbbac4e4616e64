"""
Read the memories of a project of Mem0 Platform, expired ones too.

The service lists memories by entity only, so all of them are the union of those that have a user, an agent, an app or a
run. A memory with several of these is in several of the four lists; it is taken from the list of its first one, in this
order, and passed over in the others. So nothing has to be remembered about the memories that were read.

What the descriptions of the API leave open is whether the list of `{"user_id": "*"}` holds memories that have an agent
besides ("implicit null scoping" says no, the newer filter guide says yes). So a fifth list, "has any of the four",
is counted; where it holds more than was read, memories of those combinations of entities that no list showed are taken
from it. This is right whichever way the service does it, also for a mixture.

Sources: docs.mem0.ai, Get Memories, Memory Filters, Entity-Scoped Memory; mem0ai 2.2 `mem0/client/main.py`. Nobody has
run this against the live service; `tests/platform_server.py` says what is assumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memharbor.errors import SourceDataError
from memharbor.migrate.http import HttpClient
from memharbor.migrate.record import RawItem, Refusal, SourceInfo

ENTITIES = ("user_id", "agent_id", "app_id", "run_id")
PAGE_SIZE = 200  # the most that v3 gives
OLD_PAGE_SIZE = 100  # of v1 and v2, where no maximum is documented
Version = Literal["v3", "v2", "v1"]
_NOT_THERE = (404, 405)
_HAS_ANY: Mapping[str, Any] = {"OR": [{name: "*"} for name in ENTITIES]}


@dataclass(frozen=True)
class Page:
    """
    One page of a list of memories.

    Args:
        number: From 1.
        count: How many there are in the whole list; `None` where the service does not say.
        items: As they came.
    """

    number: int
    count: int | None
    items: Sequence[Any]


@dataclass(frozen=True)
class Scope:
    """
    One list of memories.

    Args:
        field: The entity that all in it have; empty for a list of combinations (see this module).
        value: Which entity; `*` for any.
        filters: What v2 and v3 are asked for.
    """

    field: str
    value: str
    filters: Mapping[str, Any]


def scopes_of(field: str, value: str) -> tuple[Scope, Scope]:
    """
    Make the two lists that together hold every memory of one entity, whatever a filter says of entities it does not name.

    >>> [scope.filters["AND"][0] for scope in scopes_of("user_id", "alice")]
    [{'user_id': 'alice'}, {'user_id': 'alice'}]
    """
    own = {field: value}
    return Scope(field, value, {"AND": [own]}), Scope("", value, {"AND": [own, _HAS_ANY]})


def every_scope() -> tuple[Scope, ...]:
    """Make the lists that together hold every memory of a project."""
    each = tuple(Scope(name, "*", {"AND": [{name: "*"}]}) for name in ENTITIES)
    return (*each, Scope("", "*", _HAS_ANY))


def read_pages(http: HttpClient, scope: Scope, version: Version = "v3", first: int = 1) -> Iterator[Page]:
    """
    Read the pages of a list, expired memories too.

    Args:
        http: The service.
        scope: Which list.
        version: Of the API.
        first: The page to begin with, from 1.

    Raises:
        SourceDataError: An answer is not what the API describes.
        ConnectError: The service cannot be reached.
    """
    number, before = first, None
    while True:
        page, is_last = _page(http, scope, version, number)
        if page is None:
            return
        # A service that takes no notice of `page` would be read for ever.
        shown = [each.get("id") if isinstance(each, Mapping) else None for each in page.items]
        if shown and shown == before and any(shown):
            raise SourceDataError(f"`{http.base_url}` answers page {number} with the memories of the page before")
        if page.count is not None and number > max(page.count, 0) + 1:
            raise SourceDataError(f"`{http.base_url}` names a page after {number}, and has {page.count:,} memories")
        yield page
        if is_last:
            return
        number, before = number + 1, shown


def _page(http: HttpClient, scope: Scope, version: Version, number: int) -> tuple[Page | None, bool]:
    """Read one page, and say whether it is the last; `None` behind the last one."""
    allow = (404,) if number > 1 else ()  # what the service answers for a page that does not exist
    path = f"/{version}/memories/"
    if version == "v1":
        params = {scope.field: scope.value, "show_expired": "true", "page": number, "page_size": OLD_PAGE_SIZE}
        answer = http.request("GET", path, params=params, allow=allow)
    else:
        query = {"page": number, "page_size": PAGE_SIZE if version == "v3" else OLD_PAGE_SIZE}
        body = {"filters": scope.filters, "show_expired": True}
        answer = http.request("POST", path, params=query, body=body, allow=allow)
    if answer.status == 404:
        return None, True
    if version != "v3" and isinstance(answer.data, list):
        # A bare array does not say where it ends, and a page may hold less than was asked for.
        return (Page(number, None, answer.data), False) if answer.data else (None, True)
    data = answer.data
    if not isinstance(data, Mapping) or not isinstance(data.get("results"), list):
        raise SourceDataError(f"`{http.base_url}{path}` answers no list of memories")
    count = data.get("count")
    return Page(number, count if isinstance(count, int) else None, data["results"]), not data.get("next")


@dataclass
class _Place:
    """
    Where a reader is.

    Args:
        version: Of the API that is read.
        scope: Field and value of the list.
        page: The page of the last item.
        index: Its index there.
        item_id: Its id.
        seen: How many items were yielded that the list of combinations shows too.
        shown: Combinations of entities that the lists have shown so far, one bit each.
    """

    version: Version
    scope: tuple[str, str]
    page: int = 0
    index: int = -1
    item_id: str = ""
    seen: int = 0
    shown: int = 0

    def as_text(self) -> str:
        """Spell it as a position."""
        listed = [self.version, *self.scope, self.page, self.index, self.item_id, self.seen, self.shown]
        return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


class PlatformSource:
    """
    Memories of a project of Mem0 Platform; see `memharbor.migrate.record.Source`.

    While nobody changes the project, every memory is read once, and going on behind a position yields exactly the rest.
    The service pages by number and documents no order. Memories added meanwhile push others to later pages: some may be
    read twice, under the same id, and none is missed; whether the new ones are read is a matter of luck. Memories deleted
    meanwhile pull others forward, over the edge of a page that was read: those are missed. So let nobody delete while
    this runs, or run it again: what is there already is not written twice.

    Args:
        http: The service, with its key.
        users: Only these users' memories; `None` for all of the project.
    """

    def __init__(self, http: HttpClient, *, users: Sequence[str] | None = None) -> None:
        self._http = http
        self._users = None if users is None else tuple(dict.fromkeys(users))
        self._known_version: Version | None = None

    def describe(self) -> SourceInfo:
        """Say what there is; see `Source`. The count is missing where only v1 or v2 answers, which do not tell it."""
        chosen = "all" if self._users is None else hashlib.sha256(json.dumps(self._users).encode()).hexdigest()[:16]
        project = find_project(self._http)
        identity = f"{self._http.base_url} project {project[1] if project else 'unknown'} users {chosen}"
        if self._version() != "v3":
            return SourceInfo("platform", identity)
        groups = [every_scope()] if self._users is None else [scopes_of("user_id", user) for user in self._users]
        # The last list of a group should hold the others; one that does not is no reason to announce less.
        return SourceInfo("platform", identity, {"memory": sum(max(map(self._count, group)) for group in groups)})

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every memory, list by list and page by page; see `Source`."""
        start = None if after is None else self._place(after)
        is_found = start is None
        place = start or _Place(self._version(), ("", ""))
        for scope in self._scopes(place.version):
            key = (scope.field, scope.value)
            if not is_found:
                if key != place.scope:
                    continue
                is_found = True
                yield from self._read_scope(scope, place, resumed=True)
                continue
            if self._users is not None and scope.field:
                place.seen = place.shown = 0
            place.scope, place.page, place.index, place.item_id = key, 1, -1, ""
            yield from self._read_scope(scope, place, resumed=False)
        if not is_found:
            raise SourceDataError(
                f"`{self._http.base_url}` has no list {place.scope!r} any more, which was being read",
                hint="begin a new run",
            )

    def _read_scope(self, scope: Scope, place: _Place, *, resumed: bool) -> Iterator[RawItem | Refusal]:
        pages = self._resumed(scope, place) if resumed else self._fresh(scope, place.version)
        before: set[str] = set()  # memories that new ones pushed over the edge of a page
        for page, begin in pages:
            if not scope.field and page.number == 1 and page.count is not None and page.count <= place.seen:
                return
            for index in range(begin, len(page.items)):
                item = page.items[index]
                mask = _mask(item)
                if not _is_of(scope, mask, place.shown) or _id(item) in before:
                    continue
                if scope.field:
                    place.shown |= 1 << mask if mask else 0
                    place.seen += 1
                place.page, place.index, place.item_id = page.number, index, _id(item)
                yield _raw(item, place.as_text(), scope)
            before = {_id(item) for item in page.items} - {""}

    def _fresh(self, scope: Scope, version: Version) -> Iterator[tuple[Page, int]]:
        return ((page, 0) for page in read_pages(self._http, scope, version))

    def _resumed(self, scope: Scope, place: _Place) -> Iterator[tuple[Page, int]]:
        """Find the last item again, on its page or on those beside it, and go on behind; else read the whole list."""
        for number in (place.page, place.page + 1, place.page - 1):
            if number < 1:
                continue
            page, is_last = _page(self._http, scope, place.version, number)
            found = _index(page, place) if page is not None else None
            if page is not None and found is not None:
                yield page, found + 1
                if not is_last:
                    yield from ((each, 0) for each in read_pages(self._http, scope, place.version, number + 1))
                return
        yield from self._fresh(scope, place.version)

    def _scopes(self, version: Version) -> Iterator[Scope]:
        if self._users is not None:
            for user in self._users:
                yield from (each for each in scopes_of("user_id", user) if each.field or version != "v1")
        elif version == "v1":
            # It knows no wildcards.
            yield from (Scope(field, name, {}) for field, name in read_entities(self._http))
        else:
            yield from every_scope()

    def _place(self, after: str) -> _Place:
        try:
            version, field, value, *rest = json.loads(after)
            page, index, item_id, seen, shown = rest
        except (ValueError, TypeError):
            raise SourceDataError(f"`{after[:80]}` is no position in Mem0 Platform", hint="begin a new run") from None
        return _Place(version, (field, value), page, index, item_id, seen, shown)

    def _version(self) -> Version:
        """Find the newest list that the service has."""
        if self._known_version is None:
            body = {"filters": every_scope()[0].filters, "show_expired": True}
            versions: tuple[Version, ...] = ("v3", "v2")
            for version in versions:
                answer = self._http.request(
                    "POST", f"/{version}/memories/", params={"page": 1, "page_size": 1}, body=body, allow=_NOT_THERE
                )
                if answer.status not in _NOT_THERE:
                    self._known_version = version
                    break
            else:
                self._known_version = "v1"
        return self._known_version

    def _count(self, scope: Scope) -> int:
        params = {"page": 1, "page_size": 1}
        body = {"filters": scope.filters, "show_expired": True}
        data = self._http.request("POST", "/v3/memories/", params=params, body=body).data
        count = data.get("count") if isinstance(data, Mapping) else None
        if not isinstance(count, int):
            raise SourceDataError(f"`{self._http.base_url}/v3/memories/` answers no count")
        return count


def find_project(http: HttpClient) -> tuple[str, str] | None:
    """
    Find the organization and the project of a key.

    Returns:
        Both ids; `None` where the service does not tell them.
    """
    data = http.request("GET", "/v1/ping/", allow=_NOT_THERE).data
    if not isinstance(data, Mapping) or not data.get("org_id") or not data.get("project_id"):
        return None
    return str(data["org_id"]), str(data["project_id"])


def read_entities(http: HttpClient) -> Iterator[tuple[str, str]]:
    """
    Read the entities that have memories, as field and name, in the order of the service.

    Raises:
        SourceDataError: An answer is not what the API describes.
    """
    number = 1
    while True:
        answer = http.request("GET", "/v1/entities/", params={"page": number}, allow=(404,) if number > 1 else ())
        data = answer.data
        listed = data.get("results") if isinstance(data, Mapping) else data
        if answer.status == 404 or not listed:
            return
        if not isinstance(listed, list):
            raise SourceDataError(f"`{http.base_url}/v1/entities/` answers no list of entities")
        for each in listed:
            field = f"{each.get('type')}_id" if isinstance(each, Mapping) else ""
            if field not in ENTITIES or not each.get("name"):
                raise SourceDataError(f"`{http.base_url}/v1/entities/` lists something that is no entity")
            yield field, str(each["name"])
        if not isinstance(data, Mapping) or not data.get("next"):
            return
        number += 1


def _entity(item: Any, field: str) -> Any:
    if not isinstance(item, Mapping):
        return None
    return item.get(field) or (item.get("session_id") if field == "run_id" else None)


def _mask(item: Any) -> int:
    """Say which entities an item has, one bit each in the order of `ENTITIES`."""
    return sum(1 << bit for bit, field in enumerate(ENTITIES) if _entity(item, field))


def _is_of(scope: Scope, mask: int, shown: int) -> bool:
    """Say whether an item is taken from a list, or is another list's."""
    if not scope.field:
        return mask != 0 and not shown & 1 << mask
    first = next((field for bit, field in enumerate(ENTITIES) if mask & 1 << bit), scope.field)
    return first == scope.field


def _id(item: Any) -> str:
    found = item.get("id") if isinstance(item, Mapping) else None
    return found if isinstance(found, str) else ""


def _index(page: Page, place: _Place) -> int | None:
    """Find the item of a position on a page, first where it was."""
    if page.number == place.page and place.index < len(page.items) and _id(page.items[place.index]) == place.item_id:
        return place.index
    if not place.item_id:
        return None
    return next((index for index, item in enumerate(page.items) if _id(item) == place.item_id), None)


def _raw(item: Any, position: str, scope: Scope) -> RawItem | Refusal:
    if not isinstance(item, Mapping):
        return Refusal("bad-json", "it is no JSON object", RawItem("memory", "", {"item": item}, position))
    data = {name: value for name, value in item.items() if value is not None and name != "session_id"}
    run = _entity(item, "run_id")
    if run is not None:
        data["run_id"] = run
    if scope.field == "user_id" and scope.value != "*":
        data.setdefault("user_id", scope.value)
    metadata = data.get("metadata", {})
    # One of the caller's own of that name is told apart where the memory is transformed.
    if isinstance(metadata, Mapping) and "app_id" in data and "app_id" not in metadata:
        data["metadata"] = {**metadata, "app_id": data.pop("app_id")}
    raw = RawItem("memory", _id(item), data, position)
    if not raw.source_id:
        return Refusal("no-id", "it has no id, or one that is no text", raw)
    return raw
