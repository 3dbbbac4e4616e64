"""The client of web services: what it tries again, what it gives up, and that nobody sees its key."""

from __future__ import annotations

import logging
import socket
import traceback
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from pydantic import SecretStr

from memharbor.errors import ConfigError, ConnectError, MemharborError, SourceDataError
from memharbor.migrate.http import HttpClient, LostAnswerError
from memharbor.migrate.record import RawItem, Refusal
from memharbor.migrate.sources.platform import PlatformSource
from tests.platform_server import KEY, NOW, FakeClock, Fault, PlatformServer, client, memory_of

LIST = "/v3/memories/"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def memories(count: int) -> list[dict[str, Any]]:
    return [memory_of(f"fact {n}", n, user_id="u") for n in range(count)]


def faulted(*faults: Fault, count: int = 450, **options: Any) -> tuple[list[str], list[float], list[str]]:
    """Read through faults: the ids that came, the waits, and the ids that there are."""
    clock = FakeClock()
    with PlatformServer(memories(count)) as server:
        server.faults = list(faults)
        with client(server, clock, **options) as http:
            found = [item.source_id for item in PlatformSource(http).read() if isinstance(item, RawItem)]
        assert server.faults == []
        return found, clock.slept, [memory["id"] for memory in reversed(server.memories)]


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [("7", 7.0), (format_datetime(NOW + timedelta(seconds=42), usegmt=True), 42.0), ("0", 0.5), ("soon", 0.5)],
)
def test_a_429_is_waited_for_as_long_as_it_says(wish: str, seconds: float) -> None:
    found, slept, there = faulted(Fault("status", LIST, skip=2, status=429, headers={"Retry-After": wish}))
    assert found == there
    assert len(slept) == 1
    assert seconds / 2 <= slept[0] <= seconds


def test_a_date_in_the_past_is_no_wait_of_nothing() -> None:
    past = format_datetime(NOW - timedelta(hours=1), usegmt=True)
    _, slept, _ = faulted(Fault("status", LIST, status=429, headers={"Retry-After": past}))
    assert 0.25 <= slept[0] <= 0.5


def test_a_pause_that_is_too_long_ends_the_run() -> None:
    with pytest.raises(ConnectError, match="pause of 86,400 s") as caught:
        faulted(Fault("status", LIST, status=429, headers={"Retry-After": "86400"}))
    assert caught.value.hints


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_burst_of_failures_is_waited_out_longer_and_longer(status: int) -> None:
    found, slept, there = faulted(*[Fault("status", LIST, skip=3 if n == 0 else 0, status=status) for n in range(6)])
    assert found == there
    assert len(slept) == 6
    assert all(0.25 * 2**n <= seconds <= 0.5 * 2**n for n, seconds in enumerate(slept))


@pytest.mark.parametrize("kind", ["drop", "late", "cut"])
def test_a_connection_that_is_dropped_is_made_again(kind: Any) -> None:
    found, slept, there = faulted(Fault(kind, LIST, skip=3), Fault(kind, LIST), Fault(kind, LIST, skip=1))
    assert found == there
    assert len(slept) == 3


def test_a_service_that_goes_on_failing_is_given_up_and_the_run_can_be_resumed() -> None:
    clock = FakeClock()
    with PlatformServer(memories(450)) as server:
        server.faults = [Fault("status", LIST, skip=2)] + [Fault("status", LIST) for _ in range(3)]
        found: list[RawItem | Refusal] = []
        with client(server, clock, attempts=4) as http, pytest.raises(ConnectError, match="503 try later, 4 times"):
            found.extend(PlatformSource(http).read())  # keeps what came before the failure
        assert (len(found), len(clock.slept)) == (200, 3)
        assert isinstance(found[-1], RawItem)
        with client(server) as http:
            found.extend(PlatformSource(http).read(found[-1].position))
        shown = [item.source_id for item in found if isinstance(item, RawItem)]
        assert shown == [memory["id"] for memory in reversed(server.memories)]


def test_nobody_listening_is_a_connect_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        clock = FakeClock()
        http = HttpClient(address, key=SecretStr(KEY), attempts=3, clock=clock.clock())
        with http, pytest.raises(ConnectError, match="3 times"):
            list(PlatformSource(http).read())
        assert len(clock.slept) == 2


def test_a_service_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        http = HttpClient(address, attempts=2, timeout_seconds=0.05, clock=FakeClock().clock())
        with http, pytest.raises(ConnectError, match="2 times"):
            http.request("GET", "/")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_names_its_variable(status: int) -> None:
    with PlatformServer(memories(3)) as server, client(server) as http:
        server.faults = [Fault("status", status=status, body={"detail": f"bad key {KEY}"})]
        with pytest.raises(ConfigError, match=str(status)) as caught:
            list(PlatformSource(http).read())
        assert "MEM0_API_KEY" in caught.value.hints[0]
        assert KEY not in "".join(traceback.format_exception(caught.value))


def test_an_answer_that_is_not_json_is_not_tried_again() -> None:
    with PlatformServer(memories(3)) as server, client(server) as http:
        server.faults = [Fault("text", LIST, skip=1)]
        with pytest.raises(SourceDataError, match="not JSON"):
            list(PlatformSource(http).read())


@pytest.mark.parametrize("body", [[], {"count": 1}, {"results": {}}, "null", 7, "[" * 100_000])
def test_an_answer_of_another_shape_is_said_to_be_one(body: Any) -> None:
    with PlatformServer(memories(3)) as server, client(server) as http:
        server.faults = [Fault("status", LIST, skip=1, status=200, body=body)]
        with pytest.raises(SourceDataError):
            list(PlatformSource(http).read())


@pytest.mark.parametrize("status", [301, 400, 404, 418, 501])
def test_another_status_is_not_what_the_api_describes(status: int) -> None:
    with PlatformServer(memories(3)) as server, client(server) as http:
        server.faults = [
            Fault(
                "status", LIST, skip=1, status=status, headers={"Location": "http://127.0.0.1:1/"}, body={"error": "no"}
            )
        ]
        with pytest.raises(SourceDataError, match=f"{status} no"):
            list(PlatformSource(http).read())


def test_a_write_is_sent_again_only_where_it_surely_was_not_done() -> None:
    with PlatformServer() as server, client(server) as http:
        server.faults = [Fault("status", "/v1/ping/", status=429)]
        assert http.request("GET", "/v1/ping/", once=True).status == 200
        for fault in (Fault("late"), Fault("drop"), Fault("cut"), Fault("status", status=502)):
            server.requests.clear()
            server.faults = [fault]
            with pytest.raises(LostAnswerError):
                http.request("GET", "/v1/ping/", once=True)
            assert len(server.requests) == 1


def test_no_more_requests_are_sent_than_the_rate_allows() -> None:
    _, slept, _ = faulted(max_rate=4.0)
    assert slept == [0.25] * (len(slept))
    assert len(slept) == 1 + 3 + 3 + 1 - 1  # requests but the first: version, users, other lists, the count


def test_the_key_is_in_no_message_log_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with PlatformServer(memories(230)) as server, client(server, attempts=2) as http:
        source = PlatformSource(http)
        told += [repr(http), str(http), repr(vars(http)), repr(source), repr(source.describe())]
        told += [repr(item) for item in source.read()]
        for fault in ("drop", "cut", "text", "status"):
            server.faults = [Fault(fault, body={"detail": KEY}) for _ in range(2)]  # type: ignore[arg-type]
            with pytest.raises(MemharborError) as caught:
                list(PlatformSource(http).read())
            told.append("".join(traceback.format_exception(caught.value)))
    assert caplog.records
    assert all(KEY not in text for text in (*told, caplog.text))
    assert all(request.headers["authorization"] == f"Token {KEY}" for request in server.requests)


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "schlüssel"])
def test_what_cannot_be_a_key_is_not_sent_and_not_quoted(key: str) -> None:
    with pytest.raises(ConfigError, match="MEM0_API_KEY") as caught:
        HttpClient("https://api.mem0.ai", key=SecretStr(key))
    assert not key.strip() or key not in "".join(traceback.format_exception(caught.value))


def test_a_line_break_behind_a_key_is_no_part_of_it() -> None:
    with PlatformServer(memories(2)) as server, HttpClient(server.base_url, key=SecretStr(KEY + "\n")) as http:
        assert len(list(PlatformSource(http).read())) == 2


@pytest.mark.parametrize(
    "address",
    [
        "api.mem0.ai",
        "ftp://api.mem0.ai",
        "http://api.mem0.ai",
        "https://me:pw@api.mem0.ai",  # pragma: allowlist secret
        "https://[",
        "https://a:x",
    ],
)
def test_an_address_that_would_not_do_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        HttpClient(address, key=SecretStr(KEY))


def test_a_service_without_a_key_may_be_anywhere() -> None:
    HttpClient("http://embeddings.internal:8080").close()
    with PlatformServer() as server, HttpClient(server.base_url, clock=FakeClock().clock()) as http:
        with pytest.raises(ConfigError, match="401"):
            http.request("GET", "/v1/ping/")
        assert "authorization" not in server.requests[0].headers


def limits(remaining: str | None, reset: str | None) -> dict[str, str]:
    named = {"X-RateLimit-Limit": "60", "X-RateLimit-Remaining": remaining, "X-RateLimit-Reset": reset}
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (limits("0", str(int(NOW.timestamp()) + 33)), 33.0),  # Zep: seconds since 1970
        (limits(None, str(int(NOW.timestamp()) + 33)), 33.0),
        (limits("0", f"{NOW.timestamp() + 33.5}"), 33.5),
        (limits("0", str((int(NOW.timestamp()) + 33) * 1000)), 33.0),  # milliseconds
        (limits("0", "33"), 33.0),  # seconds from now
        (limits("0", str(int(NOW.timestamp()) - 33)), 0.5),  # the window has gone by
        (limits("4", str(int(NOW.timestamp()) + 33)), 0.5),  # another limit was meant
        (limits("0", "soon"), 0.5),
        (limits("0", "nan"), 0.5),
        (limits("0", "-7"), 0.5),
        (limits("0", "\u00b2"), 0.5),
        (limits("0", None), 0.5),
        ({**limits("0", "33"), "Retry-After": "7"}, 7.0),  # what is asked for goes before what is told
    ],
)
def test_a_429_without_retry_after_waits_for_the_end_of_the_window(headers: dict[str, str], seconds: float) -> None:
    found, slept, there = faulted(Fault("status", LIST, skip=2, status=429, headers=headers))
    assert found == there
    assert len(slept) == 1
    assert (slept[0] == pytest.approx(seconds)) if seconds > 0.5 else (0.25 <= slept[0] <= 0.5)


def test_a_window_that_ends_too_late_ends_the_run() -> None:
    with pytest.raises(ConnectError, match="pause of 86,400 s"):
        faulted(Fault("status", LIST, status=429, headers=limits("0", str(int(NOW.timestamp()) + 86_400))))


def test_an_error_of_the_service_waits_for_a_window_only_where_it_is_used_up() -> None:
    reset = str(int(NOW.timestamp()) + 33)
    for headers, is_waited_for in (
        (limits("0", reset), True),
        (limits("3", reset), False),
        (limits(None, reset), False),
    ):
        _, slept, _ = faulted(Fault("status", LIST, skip=2, status=503, headers=headers))
        assert (slept == [33.0]) == is_waited_for


def test_a_window_that_is_used_up_is_waited_for_before_anything_is_refused() -> None:
    with PlatformServer(memories(450)) as server:
        clock = FakeClock()
        server.limits = [limits("1", "40"), limits("0", "40"), limits("9", "40"), limits("0", "86400")]
        with client(server, clock) as http:
            found = [item.source_id for item in PlatformSource(http).read() if isinstance(item, RawItem)]
        assert len(found) == 450
        assert clock.slept == [40.0]  # a window of a day ends no run that was refused nothing
