"""What a drill decides and writes without a stack: plans, reports, schedules; and how killed owners are told."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.backup.drill_report import CheckResult, DrillReport, StepResult, render_html, write_report
from memharbor.backup.drill_schedule import (
    Job,
    describe_job,
    is_overdue,
    merge_crontab,
    read_note,
    render_crontab_line,
    render_units,
    write_note,
)
from memharbor.backup.engine import Backup, BackupEngine
from memharbor.backup.plan import RestorePlan, check_reached, plan_backup, plan_restore
from memharbor.backup.server import refuse_small_disk
from memharbor.backup.wal import SEGMENT_BYTES, Segment, format_lsn
from memharbor.containers import Finished
from memharbor.errors import ExternalToolError, StateRefusedError, VerificationError
from memharbor.throwaway import is_gone, owner_name, throw_away_options
from tests.unit.test_backup import SEGMENTS, FakeContainers, backup

NOW = datetime(2026, 1, 10, tzinfo=UTC)
JOB = Job("dev", "/opt/a b/memharbor", Path("/srv/50%"), Path("/srv/log"), {"HOME": "/h'o\"me", "PATH": "/bin:$x"})


def engine(containers: FakeContainers) -> BackupEngine:
    return BackupEngine(containers, "db", "main")  # type: ignore[arg-type]


def report(**changes: Any) -> DrillReport:
    values: dict[str, Any] = {
        "stack": "dev",
        "backup": "20260101-000000F",
        "backup_ended_at": NOW,
        "target": "restore point `<b>`",
        "reached_lsn": "0/1",
        "begun_at": NOW,
        "seconds": 4.0,
        "database_bytes": 1024,
        "steps": (StepResult("restore", 3.0),),
        "checks": (CheckResult("rows", True, "all <there>", 1.0), CheckResult("recall", None, "no vector", 0.0)),
    }
    return DrillReport(**{**values, **changes})


def plan(**changes: Any) -> RestorePlan:
    found = engine(FakeContainers([backup("A", segment=4, hour=1)], SEGMENTS)).get_backup("A")
    return RestorePlan(**{"backup": found, "timeline": 1, "target": "x", "options": (), **changes})


def test_a_backup_of_another_version_is_refused_before_anything_runs() -> None:
    found = Backup(**{**vars(plan().backup), "postgres_version": "17"})
    with pytest.raises(StateRefusedError, match="of PostgreSQL 17, and this stack runs 18"):
        plan_backup(found)


def test_a_backup_of_a_cluster_that_was_replaced_is_passed_over() -> None:
    raw = [backup("A", segment=4, hour=1), backup("B", segment=6, hour=2)]
    for each, number in zip(raw, (1, 2), strict=True):
        each["database"] = {"id": number}

    class Replaced(FakeContainers):
        def execute(self, name: str, command: Any, **options: Any) -> Finished:
            done = super().execute(name, command, **options)
            databases = '"db": [{"id": 1, "version": "18"}, {"id": 2, "version": "18"}], "name"'
            return Finished(0, done.stdout.replace('"name"', databases), "") if "info" in command else done

    found = engine(Replaced(raw, SEGMENTS))
    assert plan_restore(found).backup.id == "B"
    with pytest.raises(StateRefusedError, match="of a cluster that was replaced"):
        plan_restore(found, backup_id="A")


def test_a_chosen_backup_that_ended_after_the_target_is_refused_with_the_window() -> None:
    containers = FakeContainers([backup("A", segment=4, hour=1), backup("B", segment=6, hour=3)], SEGMENTS)
    at = datetime(2026, 1, 1, 2, tzinfo=UTC)
    assert plan_restore(engine(containers), at=at).backup.id == "A"
    with pytest.raises(StateRefusedError, match="`B` does not lead.*begins at 2026-01-01T03:00:00"):
        plan_restore(engine(containers), at=at, backup_id="B")


def test_a_wrong_key_is_told_from_an_empty_store_whatever_bytes_came_out() -> None:
    class WrongKey(FakeContainers):
        def execute(self, name: str, command: Any, **options: Any) -> Finished:
            status = '{"code": 99, "message": "other"}'
            repo = '[{"status": {"code": 99, "message": "[FormatError] invalid \x01\x9d info file"}}]'
            return Finished(0, f'[{{"name": "main", "status": {status}, "repo": {repo}}}]', "")

    with pytest.raises(ExternalToolError, match="not the one that it was written with") as caught:
        engine(WrongKey([], [])).list_backups()
    assert "\x01" not in caught.value.message


def test_a_position_is_sought_on_the_newest_branch_first() -> None:
    fork = 6 * SEGMENT_BYTES
    containers = FakeContainers(
        [backup("A", segment=4, hour=1)],
        [*SEGMENTS, Segment(2, 6), Segment(2, 7), Segment(2, 8)],
        histories={2: f"1\t{format_lsn(fork)}\tbefore\n"},
    )

    def timeline(lsn: int) -> int:
        return plan_restore(engine(containers), lsn=lsn).timeline

    assert timeline(fork - 100) == 1
    assert timeline(fork + 100) == 2
    assert timeline(10 * SEGMENT_BYTES) == 1  # only the abandoned branch got that far


def test_the_end_of_the_archive_names_its_timeline() -> None:
    found = plan_restore(engine(FakeContainers([backup("A", segment=4, hour=1)], SEGMENTS)))
    assert found.options == ("--type=default", "--target-timeline=1")


@given(st.integers(0, 2**30))
def test_less_than_asked_is_an_error_whatever_was_asked(reached: int) -> None:
    wanted = 7 * SEGMENT_BYTES
    for each in (plan(target_lsn=wanted), plan(end=Segment(1, 7))):
        if reached < wanted:
            with pytest.raises(VerificationError, match="recovery ended at"):
                check_reached(each, reached)
        else:
            check_reached(each, reached)


@pytest.mark.parametrize(("said", "fits"), [("1000000\n", False), ("1000000000\n", True), ("1000\n999999999\n", True)])
def test_a_disk_that_is_too_small_is_refused(said: str, fits: bool) -> None:
    def execute(_: Any) -> Finished:
        return Finished(0, said, "")

    if fits:
        refuse_small_disk(execute, 1000)
    else:
        with pytest.raises(StateRefusedError, match="the disk of the data volume has"):
            refuse_small_disk(execute, 1000)


def test_what_could_not_be_compared_is_no_fault_but_is_said() -> None:
    assert report().is_good
    assert "not compared" in report().as_text()
    failed = report(checks=(CheckResult("rows", False, "1 row", 0.0),))
    assert (failed.is_good, failed.as_data()["result"]) == (False, "failed")
    assert not report(checks=()).is_good


def test_the_page_needs_nothing_else_and_quotes_what_it_shows() -> None:
    page = render_html(report())
    assert not [word for word in ("http:", "https:", "src=", "<script", "<link", "<b>", "<there>") if word in page]
    assert "all &lt;there&gt;" in page
    assert "3.0</td>" in page


def test_the_files_are_written_as_a_whole(tmp_path: Path) -> None:
    paths = write_report(report(), tmp_path / "drills")
    assert sorted(path.name for path in (tmp_path / "drills").iterdir()) == sorted(path.name for path in paths.values())
    assert {path.suffix for path in paths.values()} == {".txt", ".json", ".html"}


def test_a_line_of_crontab_means_in_a_shell_what_was_meant() -> None:
    line = render_crontab_line(JOB, "weekly")
    assert line.startswith("30 4 * * 0 cd ")
    assert "%" not in line.replace("\\%", "")
    # As cron does: the five fields off, `\%` is `%`.
    command = line.split(" ", 5)[5].replace("\\%", "%")
    shown = subprocess.run(
        ["sh", "-c", f"cd() {{ printf '%s\\n' \"$1\"; }}; env() {{ printf '%s\\n' \"$@\" >&2; }}; {command}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout.strip() == "/srv/50%"
    assert render_crontab_line(JOB, "daily").startswith("30 4 * * * cd ")


def test_a_crontab_keeps_what_is_not_ours() -> None:
    present = "# mine\n1 1 * * * other # memharbor-drill-dev2\n"
    once = merge_crontab(present, JOB, render_crontab_line(JOB, "weekly"))
    twice = merge_crontab(once, JOB, render_crontab_line(JOB, "daily"))
    assert twice.startswith(present)
    assert len(twice.splitlines()) == 3
    assert merge_crontab(twice, JOB, None) == present


def test_units_quote_what_systemd_would_read_as_something_else() -> None:
    units = render_units(JOB, "weekly")
    service, timer = units["memharbor-drill-dev.service"], units["memharbor-drill-dev.timer"]
    assert 'Environment="HOME=/h\'o\\"me"' in service
    assert 'ExecStart="/opt/a b/memharbor" "drill" "--stack" "dev"' in service
    assert "WorkingDirectory=/srv/50%%" in service
    assert "OnCalendar=Sun *-*-* 04:30" in timer
    assert "Persistent=true" in timer


def test_a_schedule_never_holds_a_passphrase() -> None:
    secret = {"PULUMI_CONFIG_PASSPHRASE": "made up"}  # pragma: allowlist secret
    with pytest.raises(StateRefusedError, match="must not"):
        describe_job("dev", "/m", Path("/c"), Path("/l"), secret)
    job = describe_job("dev", "/m", Path("/c"), Path("/l"), {**secret, "PULUMI_CONFIG_PASSPHRASE_FILE": "/p", "X": "y"})
    assert job.environ == {"PULUMI_CONFIG_PASSPHRASE_FILE": "/p"}


def test_a_note_of_a_schedule_is_read_back_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "drills" / "schedule.json"
    assert read_note(path) is None
    write_note(path, "weekly", "crontab", now=NOW)
    note = read_note(path)
    assert note is not None
    assert note["frequency"] == "weekly"
    write_note(path, None, None, now=NOW)
    assert read_note(path) is None


@pytest.mark.parametrize(("frequency", "latest"), [("daily", timedelta(hours=30)), ("weekly", timedelta(days=8))])
def test_a_drill_is_overdue_once_its_schedule_was_missed(frequency: str, latest: timedelta) -> None:
    note = {"frequency": frequency, "set_at": (NOW - timedelta(days=90)).isoformat()}
    assert is_overdue(note, None, NOW)
    assert not is_overdue(note, NOW - latest, NOW)
    assert is_overdue(note, NOW - latest - timedelta(seconds=1), NOW)
    assert not is_overdue(None, None, NOW)


def test_an_owner_is_gone_when_its_process_has_ended_and_not_before() -> None:
    assert not is_gone(owner_name())
    script = "from memharbor.throwaway import owner_name; print(owner_name()); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        assert not is_gone(owner)
        process.kill()
    assert is_gone(owner)


@pytest.mark.parametrize("owner", ["", ":1:1", "another-machine/1:1:1", "x"])
def test_an_owner_of_another_machine_is_never_called_gone(owner: str) -> None:
    assert not is_gone(owner)


def test_a_number_that_was_given_to_another_process_is_not_its_former_owner() -> None:
    where = owner_name().rsplit(":", 2)[0]
    assert is_gone(f"{where}:{os.getpid()}:1")


def test_a_throw_away_container_is_like_its_model_and_can_reach_nothing() -> None:
    attrs = {
        "Image": "sha256:1",
        "Name": "/dev-postgres-0",
        "Config": {"User": "101:101", "Env": ["MEMHARBOR_STANZA=main"], "Labels": {"memharbor.stack": "dev"}},
        "HostConfig": {
            "Tmpfs": {"/tmp": "rw"},
            "ShmSize": 1,
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Memory": 5,
            "MemorySwap": 5,
        },
        "Mounts": [
            {"Type": "volume", "Name": "data", "Destination": "/data", "RW": True},
            {"Type": "volume", "Name": "files", "Destination": "/etc/memharbor", "RW": False},
        ],
        "NetworkSettings": {"Networks": {"dev": {}}},
    }
    options = throw_away_options(attrs, "/data", {"store": "/store"}, ["10001"], {})
    assert options["volumes"] == ["/data", "files:/etc/memharbor:ro", "store:/store:ro"]
    assert (options["network_mode"], options["auto_remove"], options["environment"]) == ("none", True, [])
    assert "network" not in options
    assert (options["read_only"], options["cap_drop"], options["mem_limit"]) == (True, ["ALL"], 5)
    assert options["labels"]["memharbor.service"] == "throwaway"
