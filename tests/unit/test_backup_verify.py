"""What `backup verify` makes of what it read: pgBackRest's report, the list of WAL, timelines, copies."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.backup.engine import Backup
from memharbor.backup.verify_findings import Judge, MetadataFile, parse_metadata
from memharbor.backup.verify_report import BadFile, Report, parse_report
from memharbor.backup.verify_wal import (
    ArchivedWal,
    ServerWal,
    find_missing,
    gaps_of,
    in_flight,
    parse_archive,
    parse_server,
    reach_of,
)
from memharbor.backup.wal import SEGMENT_BYTES, Segment, format_lsn, history_problem, parse_segment
from memharbor.errors import ExternalToolError
from tests.corruption import FAULTS_PAGE, KINDS, NAMES_EXCHANGED, faults_page

REPORT = """\
P02   INFO: invalid checksum '20261121-153809F/bundle/1'
P01   INFO: invalid result 18-1/0000000100000000/000000010000000000000005-b8.zst: [95] raised from local-1: unable to flush
                [CryptoError] on 2 retries from 50-15059ms: unable to flush
P01   INFO: invalid result 20261121-153809F/bundle/2: [39] raised from local-2 protocol: HTTP request failed with 416 (Requested):
            *** Path/Query ***:
P01   INFO: file missing '20261121-153809F/bundle/3'
P01   INFO: file missing '20261121-153809F/bundle/3'
P02   INFO: invalid result 20261121-153809F/bundle/4: [39] raised from local-2 protocol: HTTP request failed with 503 (Busy):
P00 DETAIL: backup.info.copy does not match backup.info
P00 DETAIL: archiveId: 18-1, wal start: 000000010000000000000002, wal stop: 00000001000000000000000A
P00   INFO: stanza: main
            status: error
stanza: main
status: error
  archiveId: 18-1, total WAL checked: 9, total valid WAL: 8
    missing: 0, checksum invalid: 1, size invalid: 0, other: 0
  backup: 20261121-153809F, status: invalid, total files checked: 973, total valid files: 972
    missing: 0, checksum invalid: 1, size invalid: 0, other: 0
  backup: 20261121-153809F_20261121-153814D, status: manifest missing, total files checked: 0
  backup: 20261121-163809F, status: in-progress, total files checked: 0, total valid files: 0
"""


def backup(
    number: int, *, timeline: int = 1, references: tuple[str, ...] = (), label: str = "", end: int = 0
) -> Backup:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number)
    last = end or number
    return Backup(
        id=label or f"20260101-{number:06d}F",
        type="incr" if references else "full",
        begun_at=at,
        ended_at=at,
        database_bytes=1,
        stored_bytes=1,
        timeline=timeline,
        start_lsn=number * SEGMENT_BYTES + 40,
        stop_lsn=last * SEGMENT_BYTES + 400,
        start_segment=Segment(timeline, number).name,
        stop_segment=Segment(timeline, last).name,
        references=references,
        has_error=False,
        annotations={},
    )


def archive(segments: list[Segment], histories: dict[int, str] | None = None) -> ArchivedWal:
    texts = histories or {}
    digests = {each: hashlib.sha1(each.name.encode()).hexdigest() for each in segments}
    paths = [f"18-1/x/{each.name}-{digests[each]}.zst" for each in segments]
    listed = parse_archive([*paths, *(f"18-1/{timeline:08X}.history" for timeline in texts)])
    return ArchivedWal(listed.paths, listed.history_paths, texts)


def line(timeline: int, *numbers: int) -> list[Segment]:
    return [Segment(timeline, number) for number in numbers]


def server(*done: Segment, waiting: tuple[Segment, ...] = ()) -> ServerWal:
    return ServerWal(archived=frozenset(done), waiting=frozenset(waiting), answered=True)


def left(number: int, *, why: str = 'at restore point "x"', offset: int = 96) -> dict[int, str]:
    return {2: f"1\t{format_lsn(number * SEGMENT_BYTES + offset)}\t{why}\n"}


def missing(there: ArchivedWal, backups: list[Backup], known: ServerWal = ServerWal()) -> list[Segment]:  # noqa: B008 - frozen
    return sorted(find_missing(there, there.paths, backups, known))


def test_the_report_is_read() -> None:
    report = parse_report(REPORT)
    assert report.status == "error"
    assert report.backups == {
        "20261121-153809F": "invalid",
        "20261121-153809F_20261121-153814D": "manifest missing",
        "20261121-163809F": "in-progress",
    }
    assert [bad.reason for bad in report.bad_files] == [
        "checksum",
        "unreadable",
        "too short",
        "missing",
        "not answered",
    ]
    assert [bad.backup for bad in report.bad_files] == [
        "20261121-153809F",
        None,
        "20261121-153809F",
        "20261121-153809F",
        "20261121-153809F",
    ]
    assert report.remarks == ("backup.info.copy does not match backup.info",)


@given(st.text())
def test_no_report_is_never_a_good_one(text: str) -> None:
    assert parse_report(text).status != "ok" or "status: ok" in text


def test_a_verification_without_a_report_is_an_error_and_not_good() -> None:
    with pytest.raises(ExternalToolError, match="no report"):
        Judge(time.monotonic(), ServerWal()).report(parse_report("P00 ERROR: [049]: down\n"))


def test_segments_before_the_oldest_backup_are_not_looked_at() -> None:
    assert missing(archive(line(1, 1, 4, 5)), [backup(4)]) == []


def test_a_gap_is_found_wherever_it_is() -> None:
    backups = [backup(3), backup(6)]
    whole = line(1, 3, 4, 5, 6, 7, 8)
    assert missing(archive(whole), backups, server(Segment(1, 8))) == []
    for segment in whole:
        rest = [each for each in whole if each != segment]
        assert missing(archive(rest), backups, server(Segment(1, 8))) == [segment]


@given(st.sets(st.integers(3, 40), max_size=12))
def test_exactly_what_is_missing_is_found(gone: set[int]) -> None:
    there = line(1, *(number for number in range(3, 41) if number not in gone))
    found = missing(archive(there), [backup(3)], server(Segment(1, 40)))
    assert found == line(1, *sorted(gone))
    gaps = gaps_of(archive(there), found)
    assert {number for gap in gaps for number in range(gap.first.number, gap.last.number + 1)} == gone


def test_what_the_server_has_still_to_archive_is_not_missing() -> None:
    # Two segments are pushed side by side: the later one arrived first.
    there = archive(line(1, 3, 4, 6))
    known = server(Segment(1, 4), waiting=(Segment(1, 5),))
    assert missing(there, [backup(3)], known) == []
    assert in_flight(there, known) == line(1, 5)
    assert missing(there, [backup(3)], server(Segment(1, 4))) == line(1, 5)


def test_a_timeline_switch_is_no_gap_and_orphans_are_not_accused() -> None:
    # Timeline 2 left timeline 1 in segment 5; 6 and 7 of timeline 1 are orphans.
    there = archive([*line(1, 3, 4, 5, 6, 7), *line(2, 5, 6)], left(5))
    assert missing(there, [backup(3), backup(6, timeline=2)], server(Segment(2, 6))) == []
    # Segment 5 of timeline 1 is needed of its successor only.
    there = archive([*line(1, 3, 4), *line(2, 5, 6)], left(5))
    assert missing(there, [backup(3)], server(Segment(2, 6))) == []


def test_a_gap_before_a_timeline_switch_and_one_behind_it_are_found() -> None:
    whole = [*line(1, 3, 4, 5), *line(2, 5, 6, 7)]
    for gone in (Segment(1, 4), Segment(2, 5), Segment(2, 6), Segment(2, 7)):
        there = archive([each for each in whole if each != gone], left(5))
        assert missing(there, [backup(3)], server(Segment(2, 7))) == [gone]


def test_a_gap_where_the_cluster_lived_on_is_explained_and_any_other_on_the_old_timeline_is_not() -> None:
    segments = [*line(1, 3, 4, 5, 7), *line(2, 5, 6)]
    lost = archive(segments, left(5, why="no recovery target specified"))
    (gap,) = gaps_of(lost, missing(lost, [backup(3)], server(Segment(2, 6))))
    assert (gap.first, gap.is_explained) == (Segment(1, 6), True)
    chosen = archive(segments, left(5))
    (gap,) = gaps_of(chosen, missing(chosen, [backup(3)], server(Segment(2, 6))))
    assert not gap.is_explained
    elsewhere = archive(segments, left(4, why="no recovery target specified"))
    assert not any(gap.is_explained for gap in gaps_of(elsewhere, missing(elsewhere, [backup(3)])))


def test_how_far_a_backup_reaches() -> None:
    there = archive(line(1, 3, 4, 5, 7, 8))
    assert reach_of(there, there.paths, backup(3), 1) == (Segment(1, 5), False)
    assert reach_of(there, there.paths, backup(7), 1) == (Segment(1, 8), True)
    assert reach_of(there, there.paths, backup(6), 1) == (None, False)
    assert reach_of(there, there.paths, backup(5, end=7), 1) == (None, False)


def test_partial_segments_and_label_files_are_no_segments() -> None:
    assert parse_segment("000000010000000000000005.partial-ab12.zst") is None
    assert parse_segment("000000010000000000000005.00000028.backup") is None


def test_the_server_is_read() -> None:
    text = "stat 000000010000000000000004.00000028.backup\nstatus 000000010000000000000003.done\n"
    text += "status 000000010000000000000005.ready\nstatus 00000002.history.done\n"
    text += "status 000000010000000000000006.partial.ready\nsum abc  00000002.history\n"
    known = parse_server(text)
    assert known.archived == frozenset(line(1, 3, 4))
    assert known.waiting == frozenset(line(1, 5))
    assert known.histories == {2}
    assert known.history_sums == {2: "abc"}
    assert known.answered
    assert not parse_server("status 000000010000000000000003.done\n").answered
    assert not parse_server("stat -\n").has_archived


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no timeline"),
        ("1\t0/5\n", "line 1 is unreadable"),
        ("1\t0/5000060\tbe\x07fore\n", "line 1 is unreadable"),
        ("1\t0/5000060\tbe\ufffdfore\n", "line 1 is unreadable"),
        ("3\t0/5000060\tbefore\n", "out of order"),
        ("2\t0/5000060\tx\n1\t0/6000060\ty\n", "out of order"),
        ("1\t0/5000060\tx\n1\t0/6000060\ty\n", "out of order"),
    ],
)
def test_a_damaged_history_is_told(text: str, problem: str) -> None:
    assert problem in (history_problem(3, text) or "")


def judged(backups: list[Backup], report: Report, there: ArchivedWal, known: ServerWal) -> Judge:
    judge = Judge(time.monotonic(), known)
    judge.backups = backups
    judge.report(report)
    bad = {bad.path: bad for bad in report.bad_files if bad.backup is None}
    judge.whole_wal(there, bad, judge.missing(there))
    judge.nothing_but_a_status(report)
    return judge


def valid(*backups: Backup, bad: tuple[BadFile, ...] = (), status: str = "ok") -> Report:
    return Report(status, {each.id: "valid" for each in backups}, bad, ())


FULL = backup(3, label="20260101-000003F")
DIFF = backup(5, label="20260101-000003F_20260101-000005D", references=(FULL.id,))
NEXT = backup(7, label="20260101-000007F")
GOOD = archive(line(1, 3, 4, 5, 6, 7, 8))


def test_a_good_repository_is_good() -> None:
    result = judged([FULL, DIFF, NEXT], valid(FULL, DIFF, NEXT), GOOD, server(Segment(1, 8))).verification()
    assert result.is_good
    assert result.segment_count == 6
    assert {(each.state, each.reaches, each.reaches_end) for each in result.backups} == {
        ("good", Segment(1, 8).name, True)
    }
    assert result.as_text().startswith("good: 3 backups and 6 WAL segments")


def test_a_broken_full_takes_its_dependents_with_it() -> None:
    bad = (BadFile(f"{FULL.id}/bundle/1", "checksum"),)
    result = judged([FULL, DIFF, NEXT], valid(FULL, DIFF, NEXT, bad=bad, status="error"), GOOD, server(Segment(1, 8)))
    (finding,) = result.verification().findings
    assert finding.unusable == (FULL.id, DIFF.id)
    assert finding.restorable == NEXT.id
    assert "memharbor backup create" in finding.line
    assert "\n" not in finding.line


def test_a_backup_that_the_report_leaves_out_is_missing() -> None:
    result = judged([FULL, DIFF], valid(DIFF), GOOD, server(Segment(1, 8))).verification()
    assert [finding.kind for finding in result.findings] == ["backup-missing"]


def test_a_gap_says_what_is_still_restorable() -> None:
    there = archive(line(1, 3, 4, 5, 7, 8))
    (finding,) = (
        judged([FULL, DIFF, NEXT], valid(FULL, DIFF, NEXT), there, server(Segment(1, 8))).verification().findings
    )
    assert finding.kind == "wal-missing"
    assert finding.unusable == ()
    assert finding.restorable == f"{FULL.id}, {DIFF.id} up to the gap, everything from {NEXT.id} on"


def test_a_gap_within_a_backup_makes_it_unusable() -> None:
    there = archive(line(1, 3, 4, 6, 7, 8))
    findings = judged([FULL, DIFF, NEXT], valid(FULL, DIFF, NEXT), there, server(Segment(1, 8))).verification().findings
    assert [finding.unusable for finding in findings] == [(DIFF.id,)]


def test_a_damaged_segment_that_nobody_needs_is_not_accused() -> None:
    bad = (BadFile(f"18-1/x/{Segment(1, 1).name}-ab.zst", "checksum"),)
    result = judged([FULL], valid(FULL, bad=bad, status="error"), archive(line(1, 1, 3, 4)), server(Segment(1, 4)))
    assert result.verification().is_good


def test_an_error_that_is_not_understood_is_never_called_good() -> None:
    result = judged([FULL], valid(FULL, status="error"), GOOD, server(Segment(1, 8))).verification()
    assert [finding.kind for finding in result.findings] == ["report"]


def test_a_timeline_without_its_history_file_is_found() -> None:
    there = archive([*line(1, 3, 4, 5), *line(2, 5, 6)])
    result = judged([FULL], valid(FULL), there, server(Segment(2, 6))).verification()
    assert "history" in {finding.kind for finding in result.findings}


def test_a_history_file_that_is_not_the_servers_is_found() -> None:
    text = left(5)[2]
    there = archive([*line(1, 3, 4), *line(2, 5, 6)], {2: text})
    same = ServerWal(
        frozenset(line(2, 6)), frozenset({2}), frozenset(), {2: hashlib.sha256(text.encode()).hexdigest()}, True
    )
    assert judged([FULL], valid(FULL), there, same).verification().is_good
    other = ServerWal(frozenset(line(2, 6)), frozenset({2}), frozenset(), {2: "another"}, True)
    (finding,) = judged([FULL], valid(FULL), there, other).verification().findings
    assert "another one than the server's" in finding.what


def test_a_server_that_does_not_answer_is_said_and_not_accused() -> None:
    result = judged([FULL], valid(FULL), GOOD, ServerWal()).verification()
    assert result.is_good
    assert any("does not answer" in note for note in result.notes)


def test_a_backup_in_progress_is_not_accused() -> None:
    report = Report("ok", {FULL.id: "valid", "20260101-000009F": "in-progress"}, (), ())
    result = judged([FULL], report, GOOD, server(Segment(1, 8))).verification()
    assert result.is_good
    assert {each.id: each.state for each in result.backups}["20260101-000009F"] == "in progress"


INFO = [f"{kind}/main/{kind}.info{copy}" for kind in ("backup", "archive") for copy in ("", ".copy")]


@pytest.mark.parametrize(
    ("states", "files", "known", "kinds"),
    [
        ({}, [], server(Segment(1, 4)), ["empty"]),
        ({}, [], ServerWal(), []),
        (dict.fromkeys(INFO, "encrypted unreadable"), ["20260101-000003F/backup.manifest"], ServerWal(), ["wrong-key"]),
        (
            dict.fromkeys(INFO, "plain unreadable"),
            ["20260101-000003F/backup.manifest"],
            ServerWal(),
            ["metadata-lost"] * 2,
        ),
        ({INFO[2]: "encrypted 1", INFO[3]: "encrypted 1"}, ["x"], ServerWal(), ["metadata-lost"]),
        (dict.fromkeys(INFO, "encrypted 1"), ["20260101-000003F/backup.manifest"], ServerWal(), ["backup-unlisted"]),
        (dict.fromkeys(INFO, "encrypted 1"), ["backup.info"], ServerWal(), []),
    ],
)
def test_an_empty_store_a_wrong_key_and_damage_are_told_apart(
    states: dict[str, str], files: list[str], known: ServerWal, kinds: list[str]
) -> None:
    info = parse_metadata("".join(f"{path} {states.get(path, 'missing')}\n" for path in INFO))
    judge = Judge(time.monotonic(), known)
    judge.empty_or_unreadable(info, files, [])
    assert [finding.kind for finding in judge.verification().findings] == kinds


def test_a_list_that_is_garbled_in_the_middle_is_known_by_the_words_of_pgbackrest() -> None:
    info = parse_metadata("".join(f"{path} encrypted 1\n" for path in INFO))
    judge = Judge(time.monotonic(), ServerWal())
    words = "unable to load info file '/x/backup/main/backup.info' or '/x/backup/main/backup.info.copy':"
    judge.empty_or_unreadable(info, ["20260101-000003F/backup.manifest"], [], words)
    (finding,) = judge.verification().findings
    assert finding.what == "backup/main/backup.info and its copy are unreadable"
    assert finding.unusable == ("20260101-000003F",)


@pytest.mark.parametrize(
    ("main", "copy", "words"),
    [
        (MetadataFile("m", "good", True, "1"), MetadataFile("m.copy", "good", True, "2"), "m and its copy differ"),
        (MetadataFile("m", "missing"), MetadataFile("m.copy", "good", True, "2"), "m is missing; m.copy is good"),
        (MetadataFile("m", "good", True, "1"), MetadataFile("m.copy", "unreadable"), "m.copy is unreadable; m is good"),
    ],
)
def test_a_bad_copy_makes_no_backup_unusable(main: MetadataFile, copy: MetadataFile, words: str) -> None:
    judge = Judge(time.monotonic(), ServerWal())
    judge.backups = [FULL]
    judge.metadata([main, copy])
    (finding,) = judge.verification().findings
    assert (finding.what, finding.unusable, finding.restorable) == (words, (), "everything")


def test_a_store_that_does_not_give_a_file_out_is_an_error_and_no_damage() -> None:
    with pytest.raises(ExternalToolError):
        parse_metadata("backup/main/backup.info failed\n")


def test_the_table_of_faults_names_every_kind_and_none_is_called_good() -> None:
    page = FAULTS_PAGE.read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("| ")
    ]
    found = {row[1].strip("`"): row[3].strip("| ") for row in rows[1:]}
    assert len(KINDS) >= 20
    assert list(found) == [kind.name for kind in (*KINDS, NAMES_EXCHANGED)], "run `make soak` with `--update-golden`"
    assert all(found.values())
    assert page == faults_page(found)
