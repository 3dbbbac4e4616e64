"""Nothing of an erased user stays in the work folders of migrations."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from memharbor.migrate.forgetting import forget_user
from memharbor.migrate.record import RawItem, Refusal
from memharbor.migrate.workfolder import WorkFolder, refusal_as_data


def begun(path: Path) -> WorkFolder:
    run = WorkFolder(path)
    run.begin({"settings": {"remap_users": {}}, "source": {"name": "file"}})
    return run


def test_an_item_that_nobody_could_read_may_be_theirs(tmp_path: Path) -> None:
    run, other = begun(tmp_path / "1-file"), begun(tmp_path / "2-file")
    for each, raw in ((run, '{"user_id": "alice", "memory": "likes t'), (other, '{"user_id": "bob", "mem')):
        broken = Refusal("bad-json", "it is no JSON", RawItem("memory", "line 1", {"raw": raw}, "1"))
        each.write_segment("read", 1, [refusal_as_data(broken)], {"position": "1"})
    assert forget_user(tmp_path, "alice", dry_run=True) == ["1-file"]
    assert forget_user(tmp_path, "alice") == ["1-file"]
    assert not run.has("read", 1)
    assert other.has("read", 1)


def test_what_a_killed_process_left_half_written_goes_too(tmp_path: Path) -> None:
    run = begun(tmp_path / "1-file")
    ended = subprocess.Popen(["true"])
    ended.wait()
    cut_off = run.path / "read" / f".000001.jsonl.zst.{ended.pid}"
    being_written = run.path / "read" / f".000002.jsonl.zst.{os.getpid()}"
    for path in (cut_off, being_written):
        path.write_bytes(b"alice likes tea")
    assert forget_user(tmp_path, "alice", dry_run=True) == []
    assert cut_off.exists()
    assert forget_user(tmp_path, "alice") == []
    assert not cut_off.exists()
    assert being_written.exists(), "a migration that runs"
