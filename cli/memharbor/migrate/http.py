"""
Ask a web service as often as it takes: retries with backoff, `Retry-After`, `X-RateLimit-*`, a limit of requests a second.

The key is added to a request as it leaves and is held nowhere else: no message, log line or `repr` shows it, and it goes
to no address but the one that was given (redirects are not followed, pages are counted instead of following links).
The waiting is done here and not by stamina, whose sleep cannot be replaced, and whose bound on the whole time does not
know that a service may ask for a longer pause.

Where `Retry-After` is absent, `X-RateLimit-Reset` says when a window ends that `X-RateLimit-Remaining` says is used up;
then nothing is sent before its end. Zep's is a Unix timestamp in seconds; of the Mem0 Platform only the names are known,
so a number too small for an instant is taken for seconds from now, and one too large for milliseconds.
Sources: RFC 9110, 10.2.3 Retry-After; httpx, Exceptions; help.getzep.com, v4, Working with rate limits; zep-cloud 4.0.1
`core/http_client.py`; mem0ai 2.2 `mem0/client/utils.py` (429).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from memharbor.errors import ConfigError, ConnectError, SourceDataError

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_WAIT_SECONDS_MAX = 30.0
# Of X-RateLimit-Reset: what is smaller is no instant of our days but a number of seconds, what is larger is milliseconds.
_INSTANT_MIN, _INSTANT_MAX = 1e9, 1e11
# A connection that was never made has carried no request, so even a write may be sent again.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class LostAnswerError(ConnectError):
    """A write was sent and its answer never came, so nobody here knows whether it was done."""


@dataclass(frozen=True)
class Answer:
    """
    What a service said.

    Args:
        status: The HTTP status, one of 200 to 299 or one that the caller allows.
        data: The decoded JSON; `None` for an empty body and for an allowed error whose body is not JSON.
    """

    status: int
    data: Any


@dataclass(frozen=True)
class Clock:
    """
    Time, as the client sees it; tests replace it.

    Args:
        sleep: Waits for some seconds.
        monotonic: Seconds that never go back.
        now: The time of the day, aware UTC.
    """

    sleep: Callable[[float], None] = time.sleep
    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


class HttpClient:
    """
    Speak JSON with one service; one thread at a time. A context manager.

    Args:
        base_url: Where it is; `https`, or a loopback address, or any `http` where no key is sent.
        key: What it knows the caller by; `None` where it asks for none.
        key_variable: The environment variable that the key came from, for hints.
        scheme: What stands before the key in `Authorization`.
        attempts: How often one request is tried at most.
        wait_seconds_max: The longest pause that a service may ask for.
        timeout_seconds: For a connection, and between two pieces of an answer.
        max_rate: Requests a second at most; `None` for as fast as answers come.
        clock: Time.

    Raises:
        ConfigError: The address or the key is none, or the key would go over an open network in the clear.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: SecretStr | None = None,
        key_variable: str = "MEM0_API_KEY",
        scheme: str = "Token",
        attempts: int = 8,
        wait_seconds_max: float = 600.0,
        timeout_seconds: float = 60.0,
        max_rate: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._variable = key_variable
        self._attempts = attempts
        self._wait_seconds_max = wait_seconds_max
        self._clock = clock or Clock()
        self._interval = 1.0 / max_rate if max_rate else 0.0
        self._next_at = 0.0
        self._key = _checked_key(key, key_variable)
        _check_address(self.base_url, has_key=self._key is not None)
        auth = _KeyAuth(scheme, self._key) if self._key else None
        self._client = httpx.Client(
            timeout=timeout_seconds, auth=auth, headers={"Accept": "application/json", "User-Agent": "memharbor"}
        )

    def __repr__(self) -> str:
        return f"HttpClient({self.base_url!r})"

    def __enter__(self) -> Self:
        """Lend the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close its connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def pause(self, attempt: int) -> None:
        """Wait as long as before the retry that follows attempt number `attempt`, counted from 1."""
        self._clock.sleep(_backoff_seconds(attempt))

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        allow: Collection[int] = (),
        once: bool = False,
    ) -> Answer:
        """
        Send a request, again and again where that can help.

        Args:
            method: For instance `POST`.
            path: Below the base address, with the leading slash.
            params: The query; a list is several values of one name.
            body: JSON data; `None` for no body.
            allow: Statuses besides 200 to 299 that the caller wants to see.
            once: Whether it is a write that must not be done twice: it is sent again only where it surely was not done.

        Raises:
            ConnectError: It cannot be reached, or goes on failing; a `LostAnswerError` where a write may have been done.
            ConfigError: It does not know the key, or the address is none.
            SourceDataError: It answers something else than the service that was expected.
        """
        attempt = 0
        while True:
            attempt += 1
            failure: httpx.HTTPError | httpx.Response
            try:
                failure = self._send(method, path, params, body)
            except httpx.TransportError as exc:
                if isinstance(exc, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
                    raise ConfigError(self._clean(f"`{self.base_url}` cannot be asked: {exc}")) from None
                failure = exc
            except httpx.DecodingError as exc:
                failure = exc
            except httpx.InvalidURL as exc:
                raise ConfigError(self._clean(f"`{self.base_url}` is no address: {exc}")) from None
            if isinstance(failure, httpx.Response) and (
                failure.status_code not in RETRIED or failure.status_code in allow
            ):
                self._note_limit(failure)
                return self._answer(failure, path, allow)
            if once and not _surely_not_done(failure):
                raise LostAnswerError(self._clean(f"{method} {path}: {_words(failure)}, perhaps after the write"))
            if attempt >= self._attempts:
                raise self._given_up(failure, attempt)
            self._clock.sleep(self._wait_seconds(failure, attempt))

    def _send(self, method: str, path: str, params: Mapping[str, Any] | None, body: Any) -> httpx.Response:
        wait = self._next_at - self._clock.monotonic()
        if wait > 0:
            self._clock.sleep(wait)
        self._next_at = self._clock.monotonic() + self._interval
        content = None if body is None else json.dumps(body).encode()  # escapes halves of surrogate pairs
        headers = {} if content is None else {"Content-Type": "application/json"}
        return self._client.request(method, self.base_url + path, params=params, content=content, headers=headers)

    def _note_limit(self, response: httpx.Response) -> None:
        """Send nothing before a window's end that would be refused; one that ends late may refuse it."""
        if _remaining(response) == 0:
            left = _window_seconds(response, self._clock.now()) or 0.0
            if left <= self._wait_seconds_max:
                self._next_at = max(self._next_at, self._clock.monotonic() + left)

    def _answer(self, response: httpx.Response, path: str, allow: Collection[int]) -> Answer:
        status = response.status_code
        if status in (401, 403) and status not in allow:
            raise ConfigError(
                self._clean(f"`{self.base_url}` refuses the key: {status} {_server_words(response)}".rstrip()),
                hint=f"check the value of {self._variable}",
            )
        if not response.is_success and status not in allow:
            raise SourceDataError(
                self._clean(f"`{self.base_url}{path}` answers {status} {_server_words(response)}".rstrip())
            )
        if not response.content:
            return Answer(status, None)
        try:
            return Answer(status, json.loads(response.content))
        except (ValueError, RecursionError):
            if not response.is_success:
                return Answer(status, None)
            kind = response.headers.get("Content-Type", "no type")
            raise SourceDataError(
                self._clean(f"`{self.base_url}{path}` answers {kind}, {len(response.content):,} bytes, and not JSON"),
                hint="check the address: a proxy or a login page may stand before the service",
            ) from None

    def _wait_seconds(self, failure: httpx.HTTPError | httpx.Response, attempt: int) -> float:
        asked = _asked_seconds(failure, self._clock.now()) if isinstance(failure, httpx.Response) else None
        if asked is None:
            return _backoff_seconds(attempt)
        if asked > self._wait_seconds_max:
            raise ConnectError(
                f"`{self.base_url}` asks for a pause of {asked:,.0f} s", hint="run the same command again after it"
            )
        return max(asked, _backoff_seconds(1))

    def _given_up(self, failure: httpx.HTTPError | httpx.Response, attempts: int) -> ConnectError:
        return ConnectError(
            self._clean(f"`{self.base_url}` fails: {_words(failure)}, {attempts} times"),
            hint="run the same command again: it goes on where it stopped",
        )

    def _clean(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "***") if self._key else text


class _KeyAuth(httpx.Auth):
    """Adds the key to a request as it leaves, so that the client's own headers do not hold it."""

    def __init__(self, scheme: str, key: SecretStr) -> None:
        self._scheme, self._key = scheme, key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"{self._scheme} {self._key.get_secret_value()}"
        yield request


def _checked_key(key: SecretStr | None, variable: str) -> SecretStr | None:
    if key is None:
        return None
    # A header that cannot be sent would be quoted by the error that says so.
    text = key.get_secret_value().strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"the value of {variable} is empty, or has characters that no key has")
    return SecretStr(text)


def _check_address(address: str, *, has_key: bool) -> None:
    try:
        parts = urlsplit(address)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the address carries a user or a password", hint="give the key by its environment variable")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"`{address}` is no address of a service", hint="give one like https://api.mem0.ai")
    if has_key and parts.scheme == "http" and not _is_loopback(host):
        raise ConfigError(f"`{address}` would get the key in the clear", hint="give an https address")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _surely_not_done(failure: httpx.HTTPError | httpx.Response) -> bool:
    if isinstance(failure, httpx.Response):
        return failure.status_code == 429
    return isinstance(failure, _NEVER_SENT)


def _backoff_seconds(attempt: int) -> float:
    highest = min(_WAIT_SECONDS_MAX, 0.5 * 2 ** (attempt - 1))
    return float(highest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, hides nothing


def _asked_seconds(response: httpx.Response, now: datetime) -> float | None:
    """Read how long a service wants to be left alone; `None` where it does not say."""
    asked = _retry_after(response, now)
    if asked is not None:
        return asked
    remaining = _remaining(response)
    is_used_up = remaining == 0 or (remaining is None and response.status_code == 429)
    return _window_seconds(response, now) if is_used_up else None


def _remaining(response: httpx.Response) -> int | None:
    text = response.headers.get("X-RateLimit-Remaining", "").strip()
    return int(text[:12]) if text.isascii() and text.isdigit() else None


def _window_seconds(response: httpx.Response, now: datetime) -> float | None:
    """Read how long a window of requests lasts; what is no number of seconds and no instant to come is nothing."""
    try:
        reset = float(response.headers.get("X-RateLimit-Reset", ""))
    except ValueError:
        return None
    if reset > _INSTANT_MAX:
        reset /= 1000
    left = reset - now.timestamp() if reset >= _INSTANT_MIN else reset
    return left if math.isfinite(left) and left > 0 else None


def _retry_after(response: httpx.Response, now: datetime) -> float | None:
    """Read `Retry-After`: seconds, or an HTTP date; what is neither is no wish."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def _words(failure: httpx.HTTPError | httpx.Response) -> str:
    if isinstance(failure, httpx.Response):
        return f"{failure.status_code} {_server_words(failure)}".rstrip()
    return str(failure) or type(failure).__name__


def _server_words(response: httpx.Response) -> str:
    """Find what the service says of its error; nothing of a page of HTML."""
    try:
        data = json.loads(response.content)
    except (ValueError, RecursionError):
        return ""
    return words_of(data)


def words_of(data: Any) -> str:
    """
    Find the sentence in the body of an error, which has one of several shapes.

    >>> words_of({"detail": "Invalid token."}), words_of({"error": "400", "details": {"message": "no filter"}})
    ('Invalid token.', 'no filter')
    """
    while isinstance(data, Mapping):
        named = (data[name] for name in ("details", "detail", "message", "error") if data.get(name))
        data = next(named, [f"{name}: {value}" for name, value in data.items()])
    if isinstance(data, list):
        data = "; ".join(str(each) for each in data[:3])
    return " ".join(str(data).split())[:200]
