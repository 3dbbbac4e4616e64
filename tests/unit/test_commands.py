"""The edge: exit codes, hints, streams, and what is refused before anything happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from memharbor import commands, errors
from memharbor.output import Output


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    import os

    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MEMHARBOR_", "PULUMI_"))}
    return subprocess.run(
        [sys.executable, "-m", "memharbor", *arguments],
        capture_output=True,
        text=True,
        env={**kept, **environ},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("kind", [errors.MemharborError, *errors.MemharborError.__subclasses__()])
def test_each_error_ends_with_its_exit_code_its_cause_and_its_hints(
    kind: type[errors.MemharborError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("`x` is wrong", hint=["run `a`", "run `b`"])

    monkeypatch.setattr(commands, "cli", fail)
    with pytest.raises(SystemExit) as caught:
        commands.main([])
    assert caught.value.code == kind.exit_code
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: `x` is wrong\nhint: run `a`\nhint: run `b`\n")


def test_an_interruption_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "cli", interrupt)
    with pytest.raises(SystemExit) as caught:
        commands.main([])
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (click.Abort(), 1, "aborted\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_declined_question_is_an_aborted_prompt_and_ctrl_c_an_interruption(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @click.command()
    def ask() -> None:
        raise raised

    monkeypatch.setattr(commands, "cli", ask)
    with pytest.raises(SystemExit) as caught:
        commands.main([])
    assert caught.value.code == code
    assert capsys.readouterr().err.strip() == said.strip()


def test_ctrl_c_at_a_question_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    @click.command()
    def ask() -> None:
        commands.confirm("Delete it?", yes=False)

    monkeypatch.setattr("click.termui.visible_prompt_func", interrupt)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(commands, "cli", ask)
    with pytest.raises(SystemExit) as caught:
        commands.main([])
    assert caught.value.code == 130


def test_an_answer_of_no_is_an_aborted_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def ask() -> None:
        commands.confirm("Delete it?", yes=False)

    monkeypatch.setattr("click.termui.visible_prompt_func", lambda *_: "n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(commands, "cli", ask)
    with pytest.raises(SystemExit) as caught:
        commands.main([])
    assert caught.value.code == 1


def test_an_unknown_command_or_option_is_a_usage_error_with_the_next_command() -> None:
    for arguments in (("nonsense",), ("backup", "create", "--nonsense"), ("backup", "create", "--type", "magic")):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "--help`" in done.stderr


def test_a_password_in_an_argument_is_refused_and_not_repeated() -> None:
    done = run("status", "--dsn", "postgresql://me:s3cret@localhost/x")
    assert done.returncode == 2
    assert "s3cret" not in done.stderr + done.stdout
    assert "MEMHARBOR_DSN" in done.stderr


MALFORMED = "postgresql://me:pa ss%wordpiece@localhost/x"


@pytest.mark.parametrize("arguments", [("status",), ("doctor",), ("schema", "current")])
def test_a_malformed_dsn_is_refused_without_a_piece_of_its_password(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "--dsn", MALFORMED)
    assert done.returncode == 2
    assert done.stderr.startswith("error: `--dsn` cannot be read")
    given = run(*arguments, MEMHARBOR_DSN=MALFORMED)
    assert given.returncode == (10 if arguments == ("doctor",) else 3)
    for said in (done.stdout, done.stderr, given.stdout, given.stderr):
        assert "wordpiece" not in said
        assert "Traceback" not in said


@pytest.mark.parametrize("command", [("schema", "apply", "--component", "tables", "--dry-run"), ("schema", "plan")])
def test_a_dry_run_on_a_server_that_is_down_is_a_connect_error(command: tuple[str, ...]) -> None:
    done = run(*command, MEMHARBOR_DSN="postgresql://me@127.0.0.1:1/x")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "would run" not in done.stdout
    assert "cannot connect to postgresql://me@127.0.0.1:1/x" in done.stderr


def test_a_stack_that_is_not_up_is_a_config_error_that_says_how_to_bring_it_up(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("x")
    done = run(
        "status",
        "--stack",
        "nowhere",
        PULUMI_BACKEND_URL=f"file://{tmp_path / 'state'}",
        PULUMI_CONFIG_PASSPHRASE_FILE=str(passphrase),
    )
    assert done.returncode == 3, done.stderr
    assert "stack `nowhere` is not up" in done.stderr
    assert "make up" in done.stderr


def test_the_doctor_works_before_anything_exists(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("x")
    done = run(
        "doctor",
        "--stack",
        "nowhere",
        "--output",
        "json",
        PULUMI_BACKEND_URL=f"file://{tmp_path / 'state'}",
        PULUMI_CONFIG_PASSPHRASE_FILE=str(passphrase),
    )
    findings = {finding["area"]: finding for finding in json.loads(done.stdout)}
    assert {"python", "pulumi", "engine", "disk", "stack", "ports"} <= set(findings)
    assert findings["stack"]["level"] == "warning"
    assert all(finding["next_command"] for finding in findings.values() if finding["level"] != "ok")


def test_a_database_that_does_not_answer_is_a_connect_error_without_its_password() -> None:
    done = run("status", "--output", "json", MEMHARBOR_DSN="postgresql://me:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in done.stderr + done.stdout
    assert "cannot connect to postgresql://me@127.0.0.1:1/x" in json.loads(done.stdout)["database"]["error"]
    assert done.returncode == errors.VerificationError.exit_code


def test_physical_backups_of_a_foreign_database_name_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from memharbor.target import find_target

    target = find_target("dev", "postgresql://me@127.0.0.1:1/x", environ={})
    with pytest.raises(errors.ConfigError, match="was not made by `pulumi up`"):
        target.stack_outputs("a backup")
    with pytest.raises(errors.ConfigError) as caught:
        target.dsn("app")
    assert caught.value.hints == ("set MEMHARBOR_APP_PASSWORD",)


def test_json_stands_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("json")
    with output.step("Do it"):
        output.table([{"a": 1, "b": None}], ["a", "b"])
    said = capsys.readouterr()
    assert json.loads(said.out) == [{"a": 1, "b": None}]
    assert "Do it" in said.err


def test_a_table_is_readable_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    Output("text").table([{"name": "x", "rows": 12408, "is_good": True}], ["name", "rows", "is_good"])
    said = capsys.readouterr().out
    assert "12,408" in said
    assert "yes" in said
    assert "\x1b" not in said


def test_an_empty_table_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Output("text").table([], ["name"], empty="no backup yet")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no backup yet\n")


def test_something_that_cannot_be_taken_back_needs_a_confirmation_or_yes() -> None:
    commands.confirm("Delete it?", yes=True)
    with pytest.raises(errors.UsageError) as caught:
        commands.confirm("Delete it?", yes=False)
    assert caught.value.hints == ("pass `--yes`",)


def test_more_than_two_hints_are_a_bug() -> None:
    with pytest.raises(ValueError, match="two hints"):
        errors.MemharborError("x", hint=["a", "b", "c"])


def test_the_inventory_of_a_foreign_database_needs_no_stack_and_carries_no_secret() -> None:
    done = run(
        "stack",
        "inventory",
        "--output",
        "json",
        MEMHARBOR_DSN="postgresql://me:s3cret@db.example/postgres",  # pragma: allowlist secret
        MEMHARBOR_EMBEDDING_DIMS="8",
        MEMHARBOR_APP_PASSWORD="another",  # pragma: allowlist secret
    )
    assert done.returncode == 0, done.stderr
    variables = json.loads(done.stdout)["_meta"]["hostvars"]["memharbor"]
    assert (variables["memharbor_embedding_dims"], variables["memharbor_stack"]) == (8, {"__ansible_unsafe": ""})
    # The database is the one that the DSN names, not one of ours.
    assert variables["memharbor_database"] == {"__ansible_unsafe": "postgres"}
    assert "s3cret" not in done.stdout
    assert "another" not in done.stdout
