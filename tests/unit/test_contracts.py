"""Drift tests: one definition, many readers, and arrows that point one way."""

from __future__ import annotations

import ast
import re
import runpy
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
FOUNDATIONS = {"versions", "errors", "settings"}
TOOLS = FOUNDATIONS | {"process", "output", "templates", "database"}
ALLOWED = {
    "versions": set(),
    "errors": set(),
    "settings": FOUNDATIONS,
    "process": FOUNDATIONS,
    "output": FOUNDATIONS,
    "database": FOUNDATIONS,
    "templates": FOUNDATIONS,
    "embedder": FOUNDATIONS,
    "mem0": FOUNDATIONS,
    "stack": TOOLS,
    "server_files": TOOLS | {"stack"},
    "schema": TOOLS,
    "target": TOOLS | {"stack"},
    "rollout": TOOLS | {"target", "schema"},
    "containers": TOOLS,
    "pooler": TOOLS | {"containers", "server_files"},
    "backup": TOOLS | {"containers", "pooler", "server_files"},
    "operations": TOOLS | {"backup", "containers", "pooler", "stack"},
    "validation": TOOLS | {"embedder", "mem0", "schema"},
    "doctor": TOOLS | {"target", "operations", "containers", "schema"},
    "status": TOOLS | {"target", "operations", "containers"},
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


DDL = re.compile(
    r"\b(create|alter|drop)\s+(or\s+replace\s+)?(unique\s+)?"
    r"(table|index|view|policy|trigger|function|schema|extension|role|database|type|materialized)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "path",
    python_files(PACKAGE, INFRA, ROOT / "ansible", ROOT / "examples"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_ddl_stands_only_in_the_templates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not is_docstring_or_message(node.value):
            assert not DDL.match(node.value.strip()), f"{path}:{node.lineno}"


def is_docstring_or_message(text: str) -> bool:
    # A sentence ("Create tables, ..."), a hint ("alter system reset all; ...") or an Ansible document: not a statement.
    return text[:1].isupper() or text.startswith(("\n", "-"))


def test_derived_files_are_up_to_date() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    stale = [name for name, write in generate["PAGES"].items() if (ROOT / name).read_text() != write()]
    assert stale == [], "run `make docs`"


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


WRITERS = {
    "memharbor backup create",
    "memharbor restore",
    "memharbor schema apply",
    "memharbor schema upgrade",
    "memharbor schema downgrade",
    "memharbor stack init",
    "memharbor stack destroy",
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
    for path in python_files(PACKAGE, INFRA, ROOT / "infra" / "toolchain"):
        text = path.read_text()
        assert len(text.splitlines()) <= 420, f"{path} has become a maze"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"


def test_no_path_of_a_developers_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile("/" + r"(work|home|root|Users)/[a-z]+/")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".gz", ".xz", ".zst", ".png"):
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{name}: {found[0] if found else ''}"


def test_make_destroy_refuses_without_the_name() -> None:
    for confirm in ("", "CONFIRM=other"):
        arguments = ["make", "destroy", "STACK=precious", *filter(None, [confirm])]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 2
        assert "CONFIRM=precious" in done.stderr


def test_make_up_calls_the_three_tools_as_the_readme_shows_them() -> None:
    done = subprocess.run(["make", "-n", "up"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    steps = [line.split(" && ", 1)[-1].split(" --stack")[0] for line in done.stdout.splitlines()]
    assert steps[0] == "python3 infra/toolchain setup"
    readme = (ROOT / "README.md").read_text()
    positions = [readme.index(f"\n{step}") for step in steps[1:]]
    assert positions == sorted(positions)
    assert len(positions) == 4
