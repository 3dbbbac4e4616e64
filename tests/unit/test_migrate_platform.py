"""Mem0 Platform as a source, against a loopback server with real sockets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memharbor.errors import SourceDataError
from memharbor.migrate.record import RawItem, Refusal
from memharbor.migrate.sources.platform import ENTITIES, PlatformSource
from tests.platform_server import PlatformServer, client, memory_of

LIST = "/v3/memories/"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def read(server: PlatformServer, after: str | None = None, **options: Any) -> list[RawItem | Refusal]:
    with client(server) as http:
        return list(PlatformSource(http, **options).read(after))


def ids(found: Iterable[RawItem | Refusal]) -> list[str]:
    return [each.source_id for each in found if isinstance(each, RawItem)]


def combinations() -> list[dict[str, str]]:
    """Make the entities of a memory, in every combination that is not empty."""
    return [
        {name: f"{name}-1" for name in names}
        for size in range(1, 5)
        for names in itertools.combinations(ENTITIES, size)
    ]


def mixed(count: int) -> list[dict[str, Any]]:
    kinds = combinations()
    return [memory_of(f"fact {n}", n, **kinds[n % len(kinds)]) for n in range(count)]


def test_a_thousand_memories_come_in_pages_of_200() -> None:
    with PlatformServer([memory_of(f"fact {n}", n, user_id=f"u{n % 7}") for n in range(1_050)]) as server:
        found = ids(read(server))
        lists = [request for request in server.requests if request.path == LIST and request.query["page_size"] != "1"]
        assert len(found) == len(set(found)) == 1_050
        of_users = [request for request in lists if request.body["filters"] == {"AND": [{"user_id": "*"}]}]
        assert [request.query["page"] for request in of_users] == ["1", "2", "3", "4", "5", "6"]
        assert {request.query["page_size"] for request in lists} == {"200"}
        assert len(lists) == 6 + 3 + 1  # a page for each list that is empty, one for the count that ends the reading


def test_a_list_of_exactly_one_page_ends_there() -> None:
    with PlatformServer([memory_of(f"fact {n}", n, user_id="u") for n in range(200)]) as server:
        assert len(read(server)) == 200


@pytest.mark.parametrize("null_scoping", [False, True])
def test_the_union_of_the_lists_has_every_memory_once(null_scoping: bool) -> None:
    with PlatformServer(mixed(465), null_scoping=null_scoping) as server:
        found = ids(read(server))
        assert len(found) == 465
        assert sorted(found) == sorted(memory["id"] for memory in server.memories)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(combinations()), max_size=40),
    hidden=st.sets(st.integers(1, 15)),
    page_size=st.integers(1, 7),
)
def test_a_list_may_hide_any_combination_of_entities(
    kinds: list[dict[str, str]], hidden: set[int], page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a service takes a filter by one entity for, nothing is lost and nothing is doubled."""
    memories = [memory_of(f"fact {n}", n, **kind) for n, kind in enumerate(kinds)]

    def mask(memory: dict[str, Any]) -> int:
        return sum(1 << n for n, e in enumerate(("user_id", "agent_id", "app_id", "session_id")) if memory[e])

    class Mixture(PlatformServer):
        def _list(self, request: Any) -> Any:
            kept = self.memories
            if "OR" not in request.body["filters"]:
                self.memories = [each for each in kept if mask(each) not in hidden]
            try:
                return super()._list(request)
            finally:
                self.memories = kept

    with Mixture(memories, page_size_max=page_size) as server:
        assert sorted(ids(read(server))) == sorted(memory["id"] for memory in memories)


def test_expired_memories_are_read_and_what_they_carry_is_kept() -> None:
    memory = memory_of(
        "The trial ends",
        user_id="alice",
        run_id="session-9",
        app_id="shop",
        metadata={"source": "form"},
        categories=["billing"],
        structured_attributes={"day": 3},
        expiration_date="2020-01-31",
    )
    with PlatformServer([memory]) as server:
        (item,) = read(server)
    assert isinstance(item, RawItem)
    assert item.source_id == memory["id"]
    assert item.data == {
        "id": memory["id"],
        "memory": "The trial ends",
        "user_id": "alice",
        "run_id": "session-9",
        "metadata": {"source": "form", "app_id": "shop"},
        "categories": ["billing"],
        "structured_attributes": {"day": 3},
        "synthesized": False,
        "expiration_date": "2020-01-31",
        "created_at": "2026-01-15T10:30:00Z",
        "updated_at": "2026-01-15T10:30:00Z",
    }


def test_an_app_id_of_the_callers_own_metadata_is_not_overwritten() -> None:
    with PlatformServer([memory_of("x", user_id="u", app_id="shop", metadata={"app_id": "own"})]) as server:
        (item,) = read(server)
    assert isinstance(item, RawItem)
    assert (item.data["app_id"], item.data["metadata"]) == ("shop", {"app_id": "own"})


@pytest.mark.parametrize(
    ("versions", "null_scoping"),
    [(("v3", "v2", "v1"), False), (("v3",), True), (("v2", "v1"), False), (("v2",), True), (("v1",), False)],
)
def test_reading_goes_on_behind_any_item(versions: tuple[str, ...], null_scoping: bool) -> None:
    options: dict[str, Any] = {"versions": versions, "null_scoping": null_scoping, "page_size_max": 9}
    with PlatformServer(mixed(64), **options) as server, client(server) as http:
        whole = list(PlatformSource(http).read())
        assert len(whole) == 64
        for count in range(0, 64, 5):
            item = whole[count]
            assert isinstance(item, RawItem)
            assert list(PlatformSource(http).read(item.position)) == whole[count + 1 :]


def test_an_interrupted_run_is_resumed_at_its_page() -> None:
    with PlatformServer([memory_of(f"fact {n}", n, user_id="u") for n in range(1_000)]) as server:
        with client(server) as http:
            begun = list(itertools.islice(PlatformSource(http).read(), 650))
        server.requests.clear()
        assert isinstance(begun[-1], RawItem)
        rest = read(server, begun[-1].position)
        assert ids(begun + rest) == [memory["id"] for memory in reversed(server.memories)]
        of_users = [each for each in server.requests if each.path == LIST and "AND" in each.body["filters"]]
        assert [each.query["page"] for each in of_users if "user_id" in str(each.body)] == ["4", "5"]


def test_memories_that_are_added_meanwhile_hide_none() -> None:
    with PlatformServer([memory_of(f"fact {n}", n, user_id="u") for n in range(500)]) as server:
        before = {memory["id"] for memory in server.memories}
        with client(server) as http:
            found = []
            for item in PlatformSource(http).read():
                found.append(item)
                if len(found) in (100, 250):
                    server.memories.append(memory_of(f"new {len(found)}", user_id="u"))
        assert before <= set(ids(found))
        assert len(found) == len(set(ids(found)))  # one that was pushed over the edge of a page is not read twice
        position = next(item.position for item in found if isinstance(item, RawItem) and item.source_id[-2:] == "f0")
        server.memories += [memory_of(f"newer {n}", user_id="u") for n in range(201)]
        shown = ids(found)[: [item.position for item in found if isinstance(item, RawItem)].index(position) + 1]
        assert before <= {*shown, *ids(read(server, position))}


def test_a_place_that_cannot_be_found_again_begins_its_list_again() -> None:
    with PlatformServer([memory_of(f"fact {n}", n, user_id="u") for n in range(10)]) as server:
        item = read(server)[4]
        assert isinstance(item, RawItem)
        server.memories = [memory for memory in server.memories if memory["id"] != item.source_id]
        assert len(read(server, item.position)) == 9


def test_only_the_users_that_were_chosen_are_read() -> None:
    memories = [*mixed(60), *(memory_of(f"of {n}", user_id=n) for n in ("bob", "carol"))]
    for null_scoping in (False, True):
        with PlatformServer(memories, null_scoping=null_scoping) as server:
            with client(server) as http:
                source = PlatformSource(http, users=["bob", "user_id-1", "nobody", "bob"])
                found = list(source.read())
                info = source.describe()
            wanted = [each["id"] for each in memories if each["user_id"] in ("bob", "user_id-1")]
            assert sorted(ids(found)) == sorted(wanted)
            assert info.counts == {"memory": len(wanted)}
            for item in found[::7]:
                assert isinstance(item, RawItem)
                rest = read(server, item.position, users=["bob", "user_id-1", "nobody"])
                assert rest == found[found.index(item) + 1 :]


def test_the_source_says_what_there_is_without_reading_it() -> None:
    with PlatformServer(mixed(450)) as server, client(server) as http:
        info = PlatformSource(http).describe()
        assert (info.name, info.counts, info.dims) == ("platform", {"memory": 450}, None)
        assert "proj-1" in info.identity
        assert info.identity != PlatformSource(http, users=["u"]).describe().identity
        assert all(request.query.get("page_size", "1") == "1" for request in server.requests)


@pytest.mark.parametrize("versions", [("v2", "v1"), ("v1",)])
def test_an_older_api_is_read_where_there_is_no_newer_one(versions: tuple[str, ...]) -> None:
    with PlatformServer(mixed(330), versions=versions, page_size_max=50) as server:
        found = ids(read(server))
        assert sorted(found) == sorted(memory["id"] for memory in server.memories)
        assert server.count(f"/{versions[0]}/memories/") > 3
        with client(server) as http:
            assert PlatformSource(http).describe().counts == {}


def test_a_service_that_takes_no_notice_of_pages_is_not_read_for_ever() -> None:
    class Stubborn(PlatformServer):
        def _paged(self, request: Any, found: list[Any], default: int, *, bare: bool = False) -> Any:
            return found

    with Stubborn(mixed(5), versions=("v2",)) as server, pytest.raises(SourceDataError, match="the page before"):
        read(server)


def test_a_service_that_always_names_another_page_is_not_read_for_ever() -> None:
    class Endless(PlatformServer):
        def _paged(self, request: Any, found: list[Any], default: int, *, bare: bool = False) -> Any:
            return {"count": 3, "next": "more", "results": [memory_of("new", user_id="u")]}

    with Endless(mixed(5)) as server, pytest.raises(SourceDataError, match="names a page after"):
        read(server)


def test_one_bad_item_is_refused_and_the_others_are_read() -> None:
    good = [memory_of("one", user_id="u"), memory_of("two", user_id="u")]
    nameless = memory_of("three", user_id="u") | {"id": None}
    with PlatformServer([good[0], nameless, good[1]]) as server:
        found = read(server)
    assert [each.reason for each in found if isinstance(each, Refusal)] == ["no-id"]
    assert ids(found) == [good[1]["id"], good[0]["id"]]

    class Odd(PlatformServer):
        def _paged(self, request: Any, found: list[Any], default: int, *, bare: bool = False) -> Any:
            return {"count": 2, "next": None, "results": ["odd", found[0]] if found else []}

    with Odd([good[0]]) as server:
        found = read(server)
    assert [each.reason for each in found if isinstance(each, Refusal)] == ["bad-json"]
    assert ids(found) == [good[0]["id"]]


def test_a_position_of_something_else_is_not_read_from() -> None:
    with PlatformServer(mixed(3)) as server:
        for position in ("7", "x", '{"a": 1}', '["v3", "user_id"]'):
            with pytest.raises(SourceDataError, match="no position"):
                read(server, position)
        gone = json.dumps(["v3", "user_id", "dave", 1, 0, "x", 1, 2])
        with pytest.raises(SourceDataError, match="any more"):
            read(server, gone)


def test_a_million_pages_would_not_be_remembered() -> None:
    """What a reader keeps does not grow with what it read: its position is as long at the end as at the beginning."""
    with PlatformServer([memory_of("x" * 50, n, user_id="u") for n in range(3_000)]) as server, client(server) as http:
        source = PlatformSource(http)
        positions = [item.position for item in source.read() if isinstance(item, RawItem)]
        assert len(positions) == 3_000
        assert max(map(len, positions)) - min(map(len, positions)) < 12
        assert vars(source).keys() == vars(PlatformSource(http)).keys()
