"""The renderer, and what every SQL template keeps to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import meta

from memharbor import templates
from memharbor.errors import ConfigError
from memharbor.schema import load_steps, render_script
from memharbor.schema.migrations import COMPONENTS, Header, Step, context, split_header
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings
from memharbor.templates import ident, literal, render, template_root

ROOT = template_root()
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sql"
TEMPLATES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.sql"))
STEPS = [name for name in TEMPLATES if re.match(r"(versioned/.*\.up|repeatable/[^.]*)\.sql", name)]

HOSTILE_NAME = "we\"ird'; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘"
HOSTILE_VALUE = "o'brien\\'; drop table x; -- \" {{ 7 * 7 }} {% raw %} $$ %s 日本 🐘"


def header_of(name: str) -> Header:
    return split_header((ROOT / name).read_text(), name)[0]


# --- the renderer ----------------------------------------------------------------------------------------------------


def test_a_missing_variable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("select {{ nothing }}")
    with pytest.raises(ConfigError, match="'nothing' is undefined"):
        render("a.sql", {}, root=tmp_path)


def test_a_missing_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be rendered"):
        render("absent.sql", {}, root=tmp_path)


def test_a_value_is_never_rendered_again(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("select {{ value | literal }}")
    assert render("a.sql", {"value": "{{ 7 * 7 }}"}, root=tmp_path) == "select '{{ 7 * 7 }}'"


@pytest.mark.parametrize("name", ["", "nul\0byte", "ü" * 32])
def test_a_name_that_postgresql_would_change_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be an SQL name"):
        ident(name)


def test_a_text_with_a_nul_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="NUL"):
        literal("a\0b")


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))))
def test_a_literal_is_one_token_and_reads_back(text: str) -> None:
    quoted = literal(text).strip()
    assert split_statements(f"select {quoted}; select 2") == (f"select {quoted}", "select 2")
    inner = quoted.removeprefix("E")[1:-1].replace("''", "'")
    assert (inner.replace("\\\\", "\\") if quoted.startswith("E") else inner) == text


# --- every template --------------------------------------------------------------------------------------------------


def test_there_are_templates() -> None:
    assert len(STEPS) > 10


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_header_says_everything(name: str) -> None:
    header = header_of(name)
    assert header.component in (*COMPONENTS, "ledger", "catalog")
    assert header.purpose
    assert header.safe_to_repeat


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_declared_variables_are_the_used_ones(name: str) -> None:
    text = (ROOT / name).read_text()
    used = meta.find_undeclared_variables(templates._environment(ROOT).parse(text))
    assert sorted(used) == list(header_of(name).variables)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_uses_only_settings(name: str) -> None:
    assert set(header_of(name).variables) <= set(context(Settings()))


def test_a_setting_that_a_step_uses_is_never_a_secret() -> None:
    assert not {name for name in context(Settings()) if re.search("password|secret|token|key|verifier", name)}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_a_verify_twin_of_the_same_component(name: str) -> None:
    twin = re.sub(r"(\.up)?\.sql$", ".verify.sql", name)
    assert header_of(twin).component == header_of(name).component


@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith("versioned/")])
def test_a_versioned_step_can_be_taken_back(name: str) -> None:
    assert (ROOT / name.replace(".up.sql", ".down.sql")).exists()


def test_only_concurrent_steps_do_without_a_transaction() -> None:
    for step in load_steps(Settings()):
        assert step.transactional != ("concurrently" in step.sql), step.name


def code_of(sql: str) -> str:
    """Blank what is quoted or comment, so that words can be looked at."""
    return re.sub(r"--[^\n]*|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", " ", sql)


@pytest.mark.parametrize("step", load_steps(Settings()), ids=lambda step: step.name)
def test_sql_is_lower_case(step: Step) -> None:
    words = re.findall(r"\b[A-Z][A-Za-z]+\b", code_of(step.sql))
    assert words == []


# --- golden files ----------------------------------------------------------------------------------------------------


GOLDEN_CASES = {
    "minimal": lambda: render_script(
        Settings(embedding_dims=1, embedding_distance="inner_product", leakproof=False),
        include_graph=False,
        include_history=False,
    ),
    "default": lambda: render_script(Settings()),
    "wide": lambda: render_script(Settings(embedding_dims=3072)),
    "hostile": lambda: hostile_script(Settings().model_copy(update={"database": HOSTILE_NAME})),
}


def hostile_script(settings: Settings) -> str:
    """Everything that takes a name or a value from outside."""
    variables = {
        **context(settings),
        "vector_schema": HOSTILE_NAME,
        "index_name": HOSTILE_NAME,
        "user_id": HOSTILE_VALUE,
        "owner": HOSTILE_NAME,
        "role": HOSTILE_NAME,
        "verifier": HOSTILE_VALUE,
        "from_template0": True,
    }
    taking = [
        name
        for name in TEMPLATES
        if set(header_of(name).variables) & {"database", "vector_schema", "index_name", "user_id", "role", "verifier"}
    ]
    return "".join(f"-- {name}\n{render(name, variables)}\n" for name in taking)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_rendered_sql_is_as_reviewed(case: str, request: pytest.FixtureRequest) -> None:
    text = GOLDEN_CASES[case]()
    golden = GOLDEN / f"{case}.sql"
    if request.config.getoption("--update-golden", default=False):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "run `make golden` and review the difference"


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_rendered_sql_is_the_same_each_time_and_holds_no_secret_and_no_time(case: str) -> None:
    first = GOLDEN_CASES[case]()
    templates._environment.cache_clear()
    assert GOLDEN_CASES[case]() == first
    assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d|SCRAM-SHA-256\$\d", first)
    assert not re.search(r"password\s+'", first.replace(literal(HOSTILE_VALUE), ""))


def test_hostile_names_and_values_stay_inside_their_quotes() -> None:
    for statement in split_statements(GOLDEN_CASES["hostile"]()):
        assert "drop table" not in code_of(re.sub(r"E'(?:[^'\\]|''|\\.)*'", "", statement))


def test_every_dimension_has_a_type_that_can_be_indexed_and_a_storage_that_fits_a_page() -> None:
    def embedding_of(dims: int) -> str:
        step = next(step for step in load_steps(Settings(embedding_dims=dims)) if step.name == "0001_memories")
        column = re.search(r"embedding (\S+)", step.sql)
        storage = re.search(r"alter embedding set storage (\w+)", step.sql)
        assert column
        assert storage
        return f"{column[1].strip(',')} {storage[1]}"

    assert embedding_of(384) == '"public".vector(384) plain'
    assert embedding_of(1900) == '"public".vector(1900) plain'
    assert embedding_of(1901) == '"public".halfvec(1901) plain'
    assert embedding_of(4000) == '"public".halfvec(4000) external'
