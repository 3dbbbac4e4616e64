"""
Cut rendered SQL into statements, so that progress, errors and interruptions can name statement n of a step.

A lexer, not a parser: it knows quotes, dollar quotes and comments, which is all that decides where a semicolon ends a
statement. It does not know `begin atomic` bodies, which the templates do not use.
Source: PostgreSQL manual, Lexical Structure. (sqlparse splits inside quotes that end in a backslash.)
"""

from __future__ import annotations

import re

from memharbor.errors import ConfigError

_TOKEN = re.compile(
    r"""
      (?P<line_comment> --[^\n]* )
    | (?P<block_comment> /\* )
    | (?P<escape_string> (?<![\w$]) [eE] ' (?: [^'\\] | '' | \\. )* ' )
    | (?P<unterminated_escape> (?<![\w$]) [eE] ' )
    | (?P<string> ' (?: [^'] | '' )* ' )
    | (?P<identifier> " (?: [^"] | "" )* " )
    | (?P<dollar_string> (?<![\w$]) \$ (?P<tag> (?: [^\W\d] \w* )? ) \$ .*? \$ (?P=tag) \$ )
    | (?P<unterminated> ['"] | (?<![\w$]) \$ (?: [^\W\d] \w* )? \$ )
    | (?P<end> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_COMMENT_EDGE = re.compile(r"/\*|\*/")


def split_statements(sql: str) -> tuple[str, ...]:
    r"""
    Cut a script into its statements, without the semicolons and without those that are only comment.

    Raises:
        ConfigError: A quote or comment is not closed.

    >>> split_statements("select 'a;b'; -- c;d\n select $x$;$x$;")
    ("select 'a;b'", '-- c;d\n select $x$;$x$')
    """
    statements: list[str] = []
    begin = position = 0
    has_code = False
    while (token := _TOKEN.search(sql, position)) is not None:
        has_code = has_code or bool(sql[position : token.start()].strip())
        position = token.end()
        if token["unterminated"] or token["unterminated_escape"]:
            raise ConfigError(f"a template has a quote that is not closed: `{sql[token.start() : token.start() + 40]}`")
        if token["block_comment"]:
            position = _end_of_block_comment(sql, position)
        elif token["end"]:
            if has_code:
                statements.append(sql[begin : token.start()].strip())
            begin, has_code = position, False
        elif not token["line_comment"]:
            has_code = True
    if has_code or sql[position:].strip():
        statements.append(sql[begin:].strip())
    return tuple(statements)


def _end_of_block_comment(sql: str, position: int) -> int:
    depth = 1
    while depth:
        edge = _BLOCK_COMMENT_EDGE.search(sql, position)
        if edge is None:
            raise ConfigError("a template has a comment that is not closed")
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position
