"""Settings of a project of Mem0 Platform, by the command that sets them, against a loopback server with real sockets."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memharbor.commands import main
from memharbor.errors import ConfigError, SourceDataError, UsageError
from memharbor.mem0_config.for_platform import read_project_settings
from memharbor.migrate.targets.platform_settings import SETTINGS, Change, sync_settings
from tests.command_line import memharbor, ok, refused
from tests.platform_server import KEY, PROJECT, PROJECT_SETTINGS, Fault, PlatformServer, client

CATEGORIES = [{"food": "What they eat"}, {"travel": "Where they go"}]
WANTED = {"custom_instructions": "Keep names.\nNo dates.", "custom_categories": CATEGORIES, "decay": True}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MEM0_API_KEY_FILE", raising=False)


@pytest.fixture
def server() -> Iterator[PlatformServer]:
    with PlatformServer() as running:
        yield running


def written(folder: Path, content: Any, name: str = "platform.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def patches(server: PlatformServer) -> list[Any]:
    return [request.body for request in server.requests if request.method == "PATCH"]


def sync(server: PlatformServer, path: str, *options: str) -> Any:
    return ok("", "config", "sync-platform", path, "--url", server.base_url, *options, MEM0_API_KEY=KEY)


def test_settings_are_those_of_mem0_s_own_client() -> None:
    import inspect

    from mem0.client.project import Project

    assert set(inspect.signature(Project.update).parameters) - {"self"} == set(SETTINGS) == set(PROJECT_SETTINGS)


def test_a_dry_run_says_what_a_run_sets_and_a_second_run_sets_nothing(server: PlatformServer, tmp_path: Path) -> None:
    server.project |= {"custom_instructions": "Keep names.\nKeep dates.", "decay": True}
    path = written(tmp_path, WANTED)
    foretold = sync(server, path, "--dry-run")
    assert patches(server) == []
    assert foretold == {
        "dry_run": True,
        "changed": {
            "custom_instructions": {"from": "Keep names.\nKeep dates.", "to": "Keep names.\nNo dates."},
            "custom_categories": {"from": None, "to": CATEGORIES},
        },
        "same": ["decay"],
        "unsupported": [],
        "untaken": [],
    }
    assert sync(server, path) == {**foretold, "dry_run": False}
    ids = {"org_id": "org-1", "project_id": "proj-1"}
    differing = {name: WANTED[name] for name in ("custom_instructions", "custom_categories")}
    assert patches(server) == [{**differing, **ids}]
    assert server.project == {**dict.fromkeys(PROJECT_SETTINGS), **WANTED}
    again = sync(server, path)
    assert (again["changed"], again["same"]) == ({}, list(WANTED))
    assert len(patches(server)) == 1


def test_a_person_sees_the_lines_that_differ(server: PlatformServer, tmp_path: Path) -> None:
    server.project |= {"custom_instructions": "Keep names.\nKeep dates.", "custom_categories": CATEGORIES[:1]}
    options = ("config", "sync-platform", written(tmp_path, WANTED), "--url", server.base_url, "--dry-run")
    said = memharbor("", *options, MEM0_API_KEY=KEY).stdout.splitlines()
    assert "--- custom_instructions, as it is" in said
    assert {" Keep names.", "-Keep dates.", "+No dates."} <= set(said)
    assert {' {"food": "What they eat"}', '+{"travel": "Where they go"}', "+true"} <= set(said)
    assert said[-1] == "would set custom_instructions, custom_categories, decay"


def test_a_last_line_that_is_empty_is_shown() -> None:
    assert Change("custom_instructions", "a", "a\n").diff().splitlines()[-2:] == [" a", "+"]


def test_what_is_null_or_not_named_stays(server: PlatformServer, tmp_path: Path) -> None:
    server.project |= {"custom_instructions": "Keep names.", "multilingual": True}
    done = sync(server, written(tmp_path, {"custom_instructions": None, "decay": True}))
    assert list(done["changed"]) == ["decay"]
    assert server.project["custom_instructions"] == "Keep names."
    assert server.project["multilingual"] is True


@pytest.mark.parametrize("empty", ["", [], False])
def test_what_was_never_set_is_the_same_as_what_is_empty(empty: Any, server: PlatformServer) -> None:
    name = {"": "custom_instructions", "[]": "custom_categories", "False": "decay"}[str(empty)]
    with client(server) as http:
        assert sync_settings(http, {name: empty}).same == (name,)
        server.project[name] = {"": "x", "[]": CATEGORIES, "False": True}[str(empty)]
        assert [change.name for change in sync_settings(http, {name: empty}).changes] == [name]
    assert server.project[name] == empty


def test_a_configuration_of_mem0_gives_its_prompt_and_the_rest_is_named(server: PlatformServer, tmp_path: Path) -> None:
    program = (
        "import os\nfrom mem0 import Memory\nPROMPT = 'Keep names.'\n"
        "config = {'custom_fact_extraction_prompt': PROMPT, 'llm': {'provider': 'openai', 'config':"
        " {'api_key': os.environ['OPENAI_API_KEY']}}}\nmemory = Memory.from_config(config)\n"
    )
    path = written(tmp_path, program, "memory.py")
    options = ("config", "sync-platform", path, "--url", server.base_url, "--output", "json")
    done = memharbor("", *options, MEM0_API_KEY=KEY)
    report = json.loads(done.stdout)
    assert report["changed"] == {"custom_instructions": {"from": None, "to": "Keep names."}}
    assert report["unsupported"] == ["llm"]
    assert "renamed `custom_fact_extraction_prompt`" in done.stderr
    assert "`llm` is no setting of a project" in done.stderr
    assert server.project["custom_instructions"] == "Keep names."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.toml", 'custom_instructions = "Keep names."\ndecay = true\n'),
        ("x.yaml", "custom_instructions: Keep names.\ndecay: true\n"),
        ("x.json", '{"custom_prompt": "Keep names.", "decay": true}'),
    ],
)
def test_settings_come_in_several_forms(name: str, content: str, tmp_path: Path) -> None:
    if name.endswith(".yaml"):
        pytest.importorskip("yaml", reason="PyYAML is not installed")
    settings, _ = read_project_settings(Path(written(tmp_path, content, name)))
    assert settings == {"custom_instructions": "Keep names.", "decay": True}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{,}", r"x\.json, line 1: this is no JSON"),
        ("x.json", "[" * 100_000, "this is no JSON"),
        ("x.json", b"\xff", "this is no JSON"),
        ("x.json", "[1]", "is no mapping"),
        ("x.toml", "=", "this is no TOML"),
        ("x.json", '{"custom_prompt": "a", "custom_instructions": "b"}', "says `custom_instructions` twice"),
    ],
)
def test_a_file_that_cannot_be_understood_is_said_to_be_none(
    name: str, content: str | bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SourceDataError, match=said):
        read_project_settings(path)


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is none of"):
        read_project_settings(Path(written(tmp_path, "x", "x.ini")))


@pytest.mark.parametrize(
    "wanted",
    [
        {"custom_instructions": ["a"]},
        {"agent_custom_instructions": 7},
        {"custom_categories": "food"},
        {"custom_categories": [{"food": 1}]},
        {"custom_categories": [7]},
        {"decay": "true"},
        {"multilingual": 1},
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_anything_is_asked(
    wanted: dict[str, Any], server: PlatformServer, tmp_path: Path
) -> None:
    (name,) = wanted
    options = ("config", "sync-platform", written(tmp_path, {**WANTED, **wanted}), "--url", server.base_url)
    refused(7, f"`{name}` is not ", "", *options, MEM0_API_KEY=KEY)
    assert server.requests == []


def test_a_prompt_that_only_running_the_file_could_tell_is_refused(server: PlatformServer, tmp_path: Path) -> None:
    program = "from mem0 import Memory\nmemory = Memory.from_config({'custom_instructions': open('p').read()})\n"
    path = written(tmp_path, program, "memory.py")
    refused(7, "`custom_instructions` is not a text", "", "config", "sync-platform", path, MEM0_API_KEY=KEY)
    assert server.requests == []


def test_a_setting_that_the_service_does_not_take_is_told(
    server: PlatformServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.deaf = {"decay"}
    monkeypatch.setenv("MEM0_API_KEY", KEY)
    with pytest.raises(SystemExit) as left:
        main(["config", "sync-platform", written(tmp_path, WANTED), "--url", server.base_url, "--output", "json"])
    assert left.value.code == 10
    said = capsys.readouterr()
    assert json.loads(said.out)["untaken"] == ["decay"]
    assert "`decay` was set, and the service still shows another value" in said.err


def test_nothing_is_asked_where_no_setting_can_be_set(server: PlatformServer, tmp_path: Path) -> None:
    done = sync(server, written(tmp_path, {"llm": {}}))
    assert (done["changed"], done["unsupported"]) == ({}, ["llm"])
    assert server.requests == []


def test_a_key_without_a_project_cannot_be_given_settings(server: PlatformServer) -> None:
    server.faults = [Fault("status", "/v1/ping/", status=200, body={"status": "ok"})]
    with client(server) as http, pytest.raises(ConfigError, match="no project"):
        sync_settings(http, {"decay": True})


@pytest.mark.parametrize("kind", ["status", "drop", "late", "cut"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_faults_of_the_service_change_nothing(kind: Any, skip: int, server: PlatformServer) -> None:
    """A setting is the same however often it is set."""
    server.faults = [Fault(kind, PROJECT, skip=skip)]
    with client(server) as http:
        done = sync_settings(http, WANTED)
    assert server.faults == []
    assert [change.name for change in done.changes] == list(WANTED)
    assert done.untaken == ()
    assert server.project == {**dict.fromkeys(PROJECT_SETTINGS), **WANTED}


def test_the_key_comes_from_the_environment_and_is_in_no_message(server: PlatformServer, tmp_path: Path) -> None:
    path = written(tmp_path, WANTED)
    options = ("config", "sync-platform", path, "--url", server.base_url)
    refused(3, "key of the Mem0 Platform is not given", "", *options, MEM0_API_KEY="")
    assert server.requests == []
    wrong = "m0-anotherKEYanotherKEY"
    done = memharbor("", *options, MEM0_API_KEY=wrong)
    assert done.exception is not None
    assert "refuses the key" in str(done.exception)
    assert wrong not in done.output + "".join(traceback.format_exception(done.exception))
