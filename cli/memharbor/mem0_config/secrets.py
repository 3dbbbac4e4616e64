"""
Find the secrets of a configuration and put references to the environment in their place.

What counts as one: a text under a name like `api_key` or `password`, a password in a URI, a header that authorizes, and
a text that has the shape of a key. A variable is none; its default may be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from memharbor.mem0_config.values import Text, Variable, join, parts_of

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:password|passwd|pwd|passphrase|secret|credentials?|authorization|auth|token)(?:$|_(?!count|limit))|api_?key|apikey"
    r"|access_key|account_key|private_key|service_account_json|credentials_json|signing_key",
    re.IGNORECASE,
)
# They are texts or numbers beside secrets, and none themselves.
_NO_SECRET = re.compile(r"max_tokens|auth_type|auth_method|_path$|_file$|token_limit", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:sk|pk|rk|m0|gsk|xai|hf|pcsk|tvly|sbp)[-_][A-Za-z0-9_-]{12,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{30,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
)
_AUTHORIZATION = re.compile(r"(?P<before>\b(?:Bearer|Basic|Token) +)(?P<secret>[A-Za-z0-9._~+/=-]{8,})")
# A password in a database's URI may hold whatever was not encoded; in a URL of the web it ends with the host's name.
_URI_PASSWORD = re.compile(
    r"(?P<before>(?<![A-Za-z0-9+.-])(?!https?:)[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@:]*:)(?P<secret>\S+)(?=@)"
)
_URL_PASSWORD = re.compile(r"(?P<before>https?://[^\s/?#@:]*:)(?P<secret>[^\s/?#]+)(?=@)")
_PARAMETER = re.compile(
    r"(?P<before>(?:^|[?&;\s])(?:password|passwd|pwd|sslpassword|api_key|apikey|token|secret)\s*=\s*)"
    r"(?P<secret>'[^']*'|[^&;\s]+)",
    re.IGNORECASE,
)
_PATTERNS = (_URI_PASSWORD, _URL_PASSWORD, _PARAMETER, _AUTHORIZATION, _SHAPES)
# Where a variable stands in a text that is searched.
_MARK = re.compile("\0(\\d+)\0")
# The variables that Mem0's own classes read.
_KNOWN: dict[str, str] = {
    "openai": "OPENAI_API_KEY",
    "openai_structured": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "groq": "GROQ_API_KEY",
    "together": "TOGETHER_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "gemini": "GOOGLE_API_KEY",
    "xai": "XAI_API_KEY",
    "cohere": "COHERE_API_KEY",
    "zero_entropy": "ZERO_ENTROPY_API_KEY",
}


@dataclass(frozen=True)
class Found:
    """A secret that stood in a file: where, and the variable that is there now."""

    path: str
    variable: str


def replace_secrets(config: dict[str, Any]) -> tuple[dict[str, Any], list[Found]]:
    """
    Replace every secret of a configuration by a variable.

    >>> found = replace_secrets({"llm": {"provider": "openai", "config": {"api_key": "abc"}}})[1]
    >>> found[0].path, found[0].variable
    ('llm.config.api_key', 'OPENAI_API_KEY')
    """
    walk = _Walk()
    return walk.replaced(config, ()), walk.found


class _Walk:
    def __init__(self) -> None:
        self.found: list[Found] = []
        self._values: dict[str, Any] = {}
        self._providers: dict[str, str] = {}

    def replaced(self, value: Any, path: tuple[str, ...], *, within: bool = False) -> Any:
        if isinstance(value, dict):
            if len(path) == 1 and isinstance(value.get("provider"), str):
                self._providers[path[0]] = value["provider"]
            return {
                key: self.replaced(each, (*path, key), within=within or _is_secret_name(key))
                for key, each in value.items()
            }
        if isinstance(value, list):
            return [self.replaced(each, (*path, str(index)), within=within) for index, each in enumerate(value)]
        if within and isinstance(value, int | float) and not isinstance(value, bool):
            return Text((self._variable(str(value), path),))
        return self._text(value, path, within=within) if isinstance(value, str | Text) else value

    def _text(self, value: str | Text, path: tuple[str, ...], *, within: bool) -> Any:
        variables: list[Variable] = []
        text = ""
        for part in parts_of(value):
            if isinstance(part, Variable):
                text += f"\0{len(variables)}\0"
                variables.append(self._without_default(part, path, within=within))
            else:
                text += part.replace("\0", "")
        if within and _MARK.sub("", text):
            # Beside variables, the plain pieces are the secret.
            pieces = [
                piece if _MARK.fullmatch(piece) else self._variable(piece, path)
                for piece in re.split(r"(\0\d+\0)", text)
                if piece
            ]
        else:
            pieces = [text] if within else self._pieces(text, path)
        self._forget_defaults(text, variables, path)
        joined = join([part for piece in pieces for part in _expanded(piece, variables)])
        cast = value.cast if isinstance(value, Text) else None
        return Text(joined.parts, cast) if isinstance(joined, Text) else joined

    def _without_default(self, variable: Variable, path: tuple[str, ...], *, within: bool) -> Variable:
        """Take a default away that is a secret; the variable stays."""
        secret = within or _is_secret_name(variable.name) or _holds_secret(variable.default or "")
        if variable.default and secret:
            self._note(path, variable.name)
            return Variable(variable.name, encoded=variable.encoded)
        return variable

    def _forget_defaults(self, text: str, variables: list[Variable], path: tuple[str, ...]) -> None:
        """Take the defaults away of variables that stand where a secret stands."""
        for pattern in _PATTERNS:
            for match in pattern.finditer(text) if "secret" in pattern.groupindex else ():
                for number in map(int, _MARK.findall(match["secret"])):
                    variables[number] = self._without_default(variables[number], path, within=True)

    def _pieces(self, text: str, path: tuple[str, ...]) -> list[str | Variable]:
        """Cut a text, in which marks stand for variables, at its secrets."""
        # A prompt is prose: only what has the very shape of a key is one there.
        for pattern in (_SHAPES,) if path[0] == "custom_instructions" else _PATTERNS:
            for match in pattern.finditer(text):
                begin, end = match.span("secret") if "secret" in pattern.groupindex else match.span()
                if not _MARK.sub("", text[begin:end]).strip("'"):
                    continue
                leaf = (
                    "password" if pattern in (_URI_PASSWORD, _URL_PASSWORD) else "" if pattern is _SHAPES else "secret"
                )
                variable = self._variable(text[begin:end], path, leaf=leaf)
                return [*self._pieces(text[:begin], path), variable, *self._pieces(text[end:], path)]
        return [text]

    def _variable(self, secret: str, path: tuple[str, ...], *, leaf: str = "") -> Variable:
        name = self._name(path, leaf)
        number = 2
        while self._values.setdefault(name, secret) != secret:
            name = f"{self._name(path, leaf)}_{number}"
            number += 1
        self._note(path, name)
        return Variable(name)

    def _name(self, path: tuple[str, ...], leaf: str) -> str:
        words = [word for word in path if word != "config"]
        if leaf and words and not _is_secret_name(words[-1]):
            words[-1] = leaf
        known = _KNOWN.get(self._providers.get(path[0], "")) if len(words) == 2 and words[-1] == "api_key" else None
        return known or "MEM0_" + re.sub(r"[^A-Z0-9]+", "_", "_".join(words).upper()).strip("_")

    def _note(self, path: tuple[str, ...], variable: str) -> None:
        found = Found(".".join(path), variable)
        if found not in self.found:
            self.found.append(found)


def _expanded(piece: str | Variable, variables: list[Variable]) -> list[str | Variable]:
    """Put variables back where their marks stand."""
    if isinstance(piece, Variable):
        return [piece]
    parts = _MARK.split(piece)
    return [variables[int(part)] if index % 2 else part for index, part in enumerate(parts)]


def _is_secret_name(key: str) -> bool:
    return bool(_SECRET_KEY.search(key)) and not _NO_SECRET.search(key)


def _holds_secret(text: str) -> bool:
    return any(pattern.search(text) for pattern in _PATTERNS)
