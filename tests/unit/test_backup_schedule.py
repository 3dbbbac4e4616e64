"""When backups are made, how many stay, and what the escrow file holds: decided without a stack."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memharbor.backup.archive_lag import is_behind, is_disk_short, lag_text
from memharbor.backup.engine import BackupEngine
from memharbor.backup.retention import Expired, parse_expire
from memharbor.backup.schedule import PRESETS, Wanted, describe, parse_crontab, parse_runs
from memharbor.backup.tables import SHARED_TABLES, USER_TABLES
from memharbor.containers import Finished
from memharbor.cron import find_next, parse_cron
from memharbor.errors import ConfigError, ExternalToolError, StateRefusedError, UsageError
from memharbor.server_files.postgres import render_crontab
from memharbor.settings import Settings, load_settings
from memharbor.stack.escrow import Escrow, escrow_path, merge_settings, read_escrow, write_escrow
from memharbor.stack.secrets import certificate_nodes, complete_secrets

MADE_UP = "hunter2"

ROOT = Path(__file__).resolve().parents[2]
POSTGRES = ROOT / "docker" / "postgres"
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)

# --- cron


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("47 * * * *", "2026-11-21T12:47:00"),
        ("0 12 * * *", "2026-11-22T12:00:00"),
        ("17 2 * * 0", "2026-11-22T02:17:00"),
        ("*/20 13 * * *", "2026-11-21T13:00:00"),
        ("5/50 * * * *", "2026-11-21T12:05:00"),
        ("0 0 1 * *", "2026-12-01T00:00:00"),
        ("0 0 29 2 *", "2028-02-29T00:00:00"),
        ("30 4 * 1,3-4 1-5", "2027-01-01T04:30:00"),
    ],
)
def test_the_next_time_is_found(expression: str, expected: str) -> None:
    assert find_next(expression, NOW).isoformat() == f"{expected}+00:00"


@pytest.mark.parametrize(
    "expression",
    ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "5-1 * * * *", "*/0 * * * *"]
    + ["a * * * *", "1,, * * * *", "-1 * * * *", "0 0 1 * 1", "0 0 31 2 *", "@daily", "* * * * * *"],
)
def test_what_is_no_schedule_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_cron(expression)


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 59), min_size=1, max_size=4),
    st.sets(st.integers(0, 23), min_size=1, max_size=3),
    st.sets(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(0, 6 * 365 * 86_400),
)
def test_the_next_time_fits_and_none_before_it_does(
    minutes: set[int], hours: set[int], weekdays: set[int], after_seconds: int
) -> None:
    expression = " ".join((*(",".join(map(str, sorted(each))) for each in (minutes, hours)), "* *"))
    expression += " " + ",".join(map(str, sorted(weekdays)))
    begin = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=after_seconds)
    found = find_next(expression, begin)

    def fits(at: datetime) -> bool:
        return at.minute in minutes and at.hour in hours and at.isoweekday() % 7 in weekdays

    assert fits(found)
    assert found > begin
    hour = begin.replace(minute=0, second=0, microsecond=0)
    candidates = [hour + timedelta(hours=step, minutes=minute) for step in range(8 * 24) for minute in minutes]
    assert found == min(each for each in candidates if each > begin and fits(each))


# --- settings and the crontab


def test_the_crontab_says_what_the_settings_say() -> None:
    some = Settings(backup_schedule_diff="", backup_schedule_incr="*/5  *  * * *")
    assert parse_crontab(render_crontab(some)) == {"full": "17 2 * * 0", "incr": "*/5 * * * *"}
    off = Settings(**{f"backup_schedule_{each}": "" for each in ("full", "diff", "incr")})
    assert parse_crontab(render_crontab(off)) == {}


def test_a_wrong_schedule_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="backup_schedule_incr: `61` is no minute"):
        load_settings(("option", {"backup_schedule_incr": "61 * * * *"}))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_a_valid_schedule(preset: str) -> None:
    load_settings(("option", Wanted(preset, {}).settings()))


def test_the_default_is_hourly_and_the_seeds_command_is_daily_for_thirty_days() -> None:
    assert PRESETS["hourly"] == ("17 2 * * 0", "17 2 * * 1-6", "47 * * * *")
    assert Wanted("daily", {"full": None}, retention_days=30).settings() == {
        "backup_schedule_full": "17 2 * * 0",
        "backup_schedule_diff": "17 2 * * 1-6",
        "backup_schedule_incr": "",
        "backup_retention_days": "30",
    }


def test_to_set_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to set"):
        Wanted(None, {"full": None}).settings()


def test_config_container_and_past_runs_stand_side_by_side() -> None:
    runs = parse_runs('{"type":"incr","result":"done","ended_at":"x"}\n{"type":\n[1]\n')
    shown = describe(Settings(), {"full": "17 2 * * 0", "incr": "0 * * * *"}, runs, NOW)
    assert not shown["is_in_force"]
    full, diff, incr = shown["backups"]
    assert full["next_run_at"] == "2026-11-22T02:17:00+00:00"
    assert (diff["in_force"], diff["next_run_at"]) == (None, None)
    assert (incr["schedule"], incr["in_force"], incr["last_run"]["result"]) == ("47 * * * *", "0 * * * *", "done")


# --- what the image's programs decide


def keep(fulls: list[tuple[float, bool]], count: int, days: int) -> int:
    """Ask the image's program how many to keep of full backups that are so many days old, damaged or not."""
    now = 1_800_000_000
    backups = [
        {"type": "full", "label": f"{age}F", "error": damaged, "timestamp": {"stop": now - int(age * 86_400)}}
        for age, damaged in fulls
    ]
    # Others do not count.
    backups += [{"type": "incr", "label": "I", "error": False, "timestamp": {"stop": now}}]
    info = [{"name": "other", "status": {"code": 2}}, {"name": "main", "status": {"code": 0}, "backup": backups}]
    done = subprocess.run(
        [POSTGRES / "retention", "main", str(count), str(days), str(now)],
        input=json.dumps(info),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    ("ages", "count", "days", "kept"),
    [
        ([1, 8, 15], 2, 0, 2),
        ([1, 8, 15], 5, 0, 3),
        # The newest of those that are old enough is what the promised days begin from.
        ([1, 8, 15, 22, 29, 36, 43], 2, 30, 6),
        ([1, 8, 15], 1, 7, 2),
        ([1, 2, 3, 4], 3, 1, 3),
        ([400], 1, 30, 1),
        ([400, 500], 2, 30, 2),
        ([], 2, 30, 1),
    ],
)
def test_a_number_and_a_number_of_days_are_both_kept(ages: list[int], count: int, days: int, kept: int) -> None:
    assert keep([(age, False) for age in ages], count, days) == kept


def test_a_damaged_backup_never_pushes_a_good_one_out() -> None:
    assert keep([(1, True), (2, False), (3, False)], 1, 0) == 2
    assert keep([(1, True), (2, True)], 1, 0) == 2
    assert keep([(5, True), (9, False)], 1, 4) == 2


def test_an_unreadable_repository_is_not_pruned() -> None:
    info = json.dumps([{"name": "main", "status": {"code": 99}}])
    done = subprocess.run([POSTGRES / "retention", "main", "1", "0"], input=info, text=True, capture_output=True)
    assert done.returncode != 0
    assert done.stdout == ""


def test_the_locks_of_the_record_cover_every_table_that_is_fingerprinted() -> None:
    listed = re.search(r"c\.relname in \((.*?)\)", (POSTGRES / "manifest.sql").read_text(), re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"'(\w+)'", listed[1])) == {table.name for table in USER_TABLES} | set(SHARED_TABLES)


# --- prune


SAID = """\
INFO: repo1: expire full backup set 20261121-154217F, 20261121-154217F_20261121-154308I
INFO: repo1: expire full backup 20261121-154314F
INFO: repo1: remove expired backup 20261121-154217F
INFO: repo1: remove expired backup 20261120-000000F
INFO: repo1: 18-1 remove archive, start = 00000001000000000000000C, stop = 000000010000000000000012
INFO: repo1: 18-1 no archive to remove
"""


def test_what_expire_removes_is_read_from_what_it_says() -> None:
    segments = [f"0000000100000000{number:08X}" for number in range(0x0A, 0x15)]
    expected = Expired(
        ("20261121-154217F", "20261121-154217F_20261121-154308I", "20261121-154314F"),
        (("00000001000000000000000C", "000000010000000000000012"),),
    )
    assert parse_expire(SAID, segments) == expected
    assert parse_expire(SAID.replace("INFO: ", "INFO: [DRY-RUN] "), segments) == expected


def test_a_whole_folder_of_wal_is_named_by_its_segments_and_an_empty_one_not_at_all() -> None:
    said = "INFO: repo1: 18-1 remove archive, start = 0000000100000000, stop = 0000000100000001"
    held = ["0000000100000000000000FE", "000000010000000100000000", "000000010000000200000000"]
    assert parse_expire(said, held).wal == ((held[0], held[1]),)
    assert parse_expire(said, held[2:]).wal == ()


class Answering:
    """A container in which every command ends in one way."""

    def __init__(self, code: int, raises: BaseException | None = None) -> None:
        self.code, self.raises = code, raises
        self.commands: list[list[str]] = []

    def is_running(self, name: str) -> bool:
        return True

    def execute(self, name: str, command: list[str], **_: Any) -> Finished:
        self.commands.append(list(command))
        if "info" in command:
            return Finished(0, json.dumps([{"name": "main", "status": {"code": 0, "message": "ok"}}]), "")
        if "repo-ls" in command:
            return Finished(0, "{}", "")
        if self.raises is not None and command[-1] == "--watched":
            raise self.raises
        return Finished(self.code, "", "ERROR: said")


def engine(containers: Answering) -> BackupEngine:
    return BackupEngine(containers, "db", "main")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (50, StateRefusedError, "another backup of this stack is running"),
        (69, StateRefusedError, "does not lead"),
        (1, ExternalToolError, "ERROR: said"),
        (0, ExternalToolError, "lists no new good backup"),
    ],
)
def test_a_backup_that_is_none_is_an_error(code: int, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        engine(Answering(code)).create_backup("incr")


def test_who_stops_waiting_stops_the_backup() -> None:
    containers = Answering(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine(containers).create_backup("full")
    assert containers.commands[-1] == ["/usr/local/lib/memharbor/backup", "stop"]


def test_prune_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memharbor.backup.engine._LOCK_TIMEOUT_SECONDS", 0)
    with pytest.raises(StateRefusedError, match="is running"):
        engine(Answering(50)).prune()


# --- the archive's lag


LAG: dict[str, Any] = {
    "last_segment": "000000010000000000000003",
    "age_seconds": 900,
    "waiting_segments": 14,
    "is_failing": True,
    "waiting_bytes": 14 << 24,
    "oldest_waiting_age_seconds": 840,
    "disk_free_bytes": 5 << 30,
    "seconds_until_full": 18_000,
}


def test_how_far_the_archive_is_behind_and_when_the_disk_is_full_is_said() -> None:
    assert lag_text(LAG) == (
        "000000010000000000000003 15 min ago, 14 segments wait (224.0 MiB), the oldest for 14 min: the backup store does"
        " not take them; at this rate the disk (5.0 GiB free) is full in 5.0 h"
    )
    assert is_behind(LAG)
    assert is_disk_short(LAG)


def test_a_short_wait_is_no_finding() -> None:
    fine = {**LAG, "is_failing": False, "oldest_waiting_age_seconds": 20, "seconds_until_full": None}
    assert lag_text(fine).endswith("14 segments wait")
    assert not is_behind(fine)
    assert not is_disk_short(fine)


# --- escrow


SECRETS = complete_secrets("dev", certificate_nodes(Settings()))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "infra").mkdir()
    (tmp_path / "Pulumi.yaml").write_text("name: memharbor\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("checkout")
def test_the_escrow_file_is_read_back_and_only_its_owner_reads_it() -> None:
    escrow = Escrow("dev", {"embedding_dims": "384"}, SECRETS)
    assert write_escrow(escrow)
    path = escrow_path("dev")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_escrow(path) == escrow
    before = path.stat()
    assert not write_escrow(escrow)
    assert path.stat() == before
    assert SECRETS.repository_passphrase not in repr(escrow)


@pytest.mark.usefixtures("checkout")
def test_a_copy_serves_until_a_secret_is_made_anew() -> None:
    write_escrow(Escrow("dev", {}, SECRETS))
    renewed = complete_secrets("dev", certificate_nodes(Settings()), SECRETS, now=datetime(2028, 11, 1, tzinfo=UTC))
    assert renewed != SECRETS
    assert not write_escrow(Escrow("dev", {"pool_port": "7000"}, renewed)), "leaf certificates can be made again"
    more = renewed.model_copy(update={"store_secrets": {**renewed.store_secrets, "later": "generated"}})
    assert not write_escrow(Escrow("dev", {}, more)), "what a later version adds is generated where it is missing"
    assert write_escrow(Escrow("dev", {}, renewed.model_copy(update={"repository_passphrase": "another"})))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hunter2", "is no escrow file"),
        (json.dumps({"format": 1, "secrets": MADE_UP}), "is no escrow file"),
        (json.dumps({"format": 2, "stack": "dev", "secrets": {}}), "another version"),
        (json.dumps({"format": 1, "stack": "dev", "secrets": {"passwords": MADE_UP}}), "wrong or missing"),
    ],
)
def test_a_damaged_escrow_file_is_refused_without_quoting_it(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "escrow.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_escrow(path)
    assert "hunter2" not in caught.value.message


def test_the_environment_wins_over_the_escrow_file_but_not_over_what_the_backups_hold() -> None:
    escrow = Escrow("dev", {"embedding_dims": "384", "pool_port": "6432"}, SECRETS)
    merged = merge_settings(escrow, "dev", {"pool_port": "7000", "embedding_dims": "384"})
    assert merged == {"embedding_dims": "384", "pool_port": "7000"}
    with pytest.raises(ConfigError, match="embedding_dims"):
        merge_settings(escrow, "dev", {"embedding_dims": "768"})
    with pytest.raises(ConfigError, match="of stack `dev`"):
        merge_settings(escrow, "prod", {})
