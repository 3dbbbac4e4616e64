"""Cutting rendered SQL into statements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.errors import ConfigError
from memharbor.schema.statements import split_statements

WHOLE = [
    "select 'a;b'",
    "select 'it''s;'",
    r"select E'\';'",
    r"select e'a\\'",
    r"select 'a\'",
    'select ";" from "we""ird;"',
    "do $$ begin perform 1; end $$",
    "do $body$ begin perform '$$;'; end $body$",
    "create function f() returns void language plpgsql as $f$ begin if true then return; end if; end $f$",
    "select 1 /* ; /* nested ; */ ; */ + 1",
    "select 1 -- ; not the end\n + 1",
    "select case when true then 1 end",
    "select $1",
    "select a$b$c from t",
]


@pytest.mark.parametrize("statement", WHOLE)
def test_a_semicolon_inside_something_ends_nothing(statement: str) -> None:
    assert split_statements(f"{statement};\nselect 2;") == (statement, "select 2")


@given(st.lists(st.sampled_from(WHOLE), max_size=6))
def test_statements_come_out_as_they_went_in(statements: list[str]) -> None:
    assert split_statements(";\n".join(statements)) == tuple(statements)


def test_comments_alone_are_no_statement() -> None:
    assert split_statements("-- nothing;\n/* here; */ ;\n;") == ()


def test_the_last_semicolon_may_be_missing() -> None:
    assert split_statements("select 1;\nselect 2") == ("select 1", "select 2")


@pytest.mark.parametrize("sql", ["select 'open", 'select "open', "do $x$ open", r"select E'open\'"])
def test_a_quote_that_is_not_closed_is_an_error(sql: str) -> None:
    with pytest.raises(ConfigError, match="not closed"):
        split_statements(sql)


def test_a_comment_that_is_not_closed_is_an_error() -> None:
    with pytest.raises(ConfigError, match="not closed"):
        split_statements("select 1 /* open")
