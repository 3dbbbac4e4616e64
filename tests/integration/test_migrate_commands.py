"""The commands of `memharbor migrate`, as a person types them, on a real database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from memharbor.commands.migrate_options import KINDS
from memharbor.migrate import opening
from memharbor.migrate.record import NAMESPACE
from memharbor.operations import migrations_folder
from tests import corpus
from tests.command_line import ok, refused
from tests.embedding_server import Fault, StrictEmbeddingServer
from tests.memory_database import Server
from tests.schema_databases import DIMS, scratch_database
from tests.user_rows import state

EMBED = ("--model", "memharbor-hash")


def export(path: Path, count: int, **changes: Any) -> Path:
    """A file as the Platform's own export has it."""
    chosen = corpus.memories()[:count]
    memories = [
        {
            "id": str(memory.id),
            "memory": memory.memory,
            "user_id": memory.user_id,
            "metadata": dict(memory.metadata),
            "categories": list(memory.categories),
            "created_at": memory.created_at.isoformat(),
            **changes,
        }
        for memory in chosen
    ]
    path.write_text(json.dumps({"results": memories}))
    return path


def ids(dsn: str) -> set[str]:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return {row[0] for row in connection.execute("select id::text from memharbor.memories").fetchall()}


def rows_of(dsn: str) -> Any:
    """Every row but the audit trail and the model on record, whose times are those of the run."""
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return {key: value for key, value in state(connection).items() if key[1] not in ("memory_history", "configs")}


def test_the_kinds_of_the_command_are_those_that_can_be_opened() -> None:
    assert tuple(KINDS) == opening.KINDS


def test_the_whole_story(dsn: str, tmp_path: Path) -> None:
    path = export(tmp_path / "export.json", 300)
    source = ("--from", "file", "--input", str(path))
    plan = ok(
        dsn, "migrate", "plan", *source, "--model", "text-embedding-3-small", "--dims", str(DIMS), "--sample", "50"
    )
    assert plan["sample"]["inserted"] == 50
    assert 200 < plan["embedding"]["texts"] < 400, "reckoned from the size of the file"
    assert plan["embedding"]["usd"] > 0
    assert ids(dsn) == set(), "a plan writes nothing"

    foretold = ok(dsn, "migrate", "run", *source, *EMBED, "--dry-run")
    assert ids(dsn) == set()
    done = ok(dsn, "migrate", "run", *source, *EMBED, "--batch-size", "100")
    assert {name: done[name] for name in foretold if name != "dry_run"} == {
        name: value for name, value in foretold.items() if name != "dry_run"
    }
    assert done["inserted"] == 300
    assert ids(dsn) == {str(memory.id) for memory in corpus.memories()[:300]}
    (listed,) = ok(dsn, "migrate", "status")
    assert (listed["name"], listed["state"], listed["loaded"]) == (done["run"], "complete", 3)
    assert ok(dsn, "migrate", "compare")["different"] == 0
    before = rows_of(dsn)
    again = ok(dsn, "migrate", "run", *source, *EMBED)
    assert (again["same"], again["inserted"], again["updated"]) == (300, 0, 0)
    assert rows_of(dsn) == before
    ok(dsn, "migrate", "rollback", done["run"], "--yes")
    assert ids(dsn) == set()
    refused(9, "was rolled back", dsn, "migrate", "resume", done["run"])


def test_compare_names_the_row_of_one_changed_float(dsn: str, server: Server, tmp_path: Path) -> None:
    path = export(tmp_path / "export.json", 250)
    ok(dsn, "migrate", "run", "--from", "file", "--input", str(path), *EMBED)
    victim = str(corpus.memories()[123].id)
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        changed = connection.execute(
            "update memharbor.memories set embedding = (select array_agg(case when n = 1 then v + 1e-6 else v end order by n)"
            " from unnest(embedding::real[]) with ordinality as each(v, n))::vector where id = %s",
            (victim,),
        )
        assert changed.rowcount == 1
    done = subprocess.run(
        [sys.executable, "-m", "memharbor", "migrate", "compare", "--output", "json"],
        env={**os.environ, "MEMHARBOR_DSN": dsn},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 10
    found = json.loads(done.stdout)
    assert (found["different"], [each["id"] for each in found["rows"]]) == (1, [victim])


def test_what_was_refused_is_mended_and_tried_again(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    good = {"id": str(uuid.uuid4()), "memory": "likes tea", "user_id": "alice"}
    path.write_text(
        json.dumps([good, {"id": "mem_2", "memory": "nobody's"}, {"id": "mem_3", "memory": "", "user_id": "a"}])
    )
    done = ok(dsn, "migrate", "run", "--from", "file", "--input", str(path))
    assert done["reasons"] == {"no-owner": 1, "no-text": 1}
    letters = migrations_folder("dev", dsn) / done["run"] / "dead-letters.jsonl"
    lines = [json.loads(line) for line in letters.read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["no-owner", "no-text"]
    lines[0]["item"]["data"]["user_id"] = "alice"
    mended = tmp_path / "mended.jsonl"
    mended.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = ok(dsn, "migrate", "retry", done["run"], "--input", str(mended))
    assert (again["inserted"], again["refused"]) == (1, 1)
    # The id is that which the first run would have made, so that the source can be run again, too.
    assert str(uuid.uuid5(NAMESPACE, "file:mem_2")) in ids(dsn)


def test_what_is_asked_for_wrongly_is_refused_before_anything_is_done(dsn: str, tmp_path: Path) -> None:
    path = str(export(tmp_path / "export.json", 3))
    run = ("migrate", "run", "--from", "file", "--input", path)
    refused(2, "needs a file", dsn, "migrate", "run", "--from", "file")
    refused(2, "is no moment", dsn, *run, "--from-date", "soon")
    refused(3, "do not fit the schema", dsn, *run, "--model", "memharbor-hash", "--dims", str(DIMS + 1))
    refused(3, "MEM0_API_KEY|is not given", dsn, "migrate", "run", "--from", "platform", MEM0_API_KEY="")
    refused(3, "is not given", dsn, "migrate", "run", "--from", "mem0-pgvector", MEMHARBOR_SOURCE_DSN="")
    (tmp_path / "names.csv").write_text("1,alice\n1,bob\n")
    refused(7, "one user twice", dsn, *run, "--remap-users", str(tmp_path / "names.csv"))
    refused(3, "there is no run", dsn, "migrate", "resume", "absent")
    assert ids(dsn) == set()
    assert not (tmp_path / "memharbor-migrations").exists()


def test_a_source_that_changed_meanwhile_is_noticed(dsn: str, tmp_path: Path) -> None:
    path = export(tmp_path / "export.json", 20)
    done = ok(dsn, "migrate", "run", "--from", "file", "--input", str(path), "--until", "transform")
    assert ids(dsn) == set()
    export(path, 21)
    refused(9, "is not what it was", dsn, "migrate", "resume", done["run"])
    export(path, 20)
    assert ok(dsn, "migrate", "resume", done["run"])["inserted"] == 20


def test_embeddings_are_filled_in_and_made_anew_by_another_model_only_all_at_once(dsn: str, tmp_path: Path) -> None:
    path = export(tmp_path / "export.json", 40)
    ok(dsn, "migrate", "run", "--from", "file", "--input", str(path))
    assert ok(dsn, "migrate", "embed", *EMBED, "--dry-run")["embedded"] == 40
    assert ok(dsn, "migrate", "embed", *EMBED)["embedded"] == 40
    assert ok(dsn, "migrate", "embed", *EMBED)["embedded"] == 0
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        connection.execute(
            "insert into memharbor.configs (key, value) values ('embedding_model', '{\"model\": \"other\"}')"
            " on conflict (key) do update set value = excluded.value"
        )
    refused(9, "cannot be compared", dsn, "migrate", "embed", *EMBED)
    assert ok(dsn, "migrate", "embed", *EMBED, "--filter", "all")["embedded"] == 40
    assert ok(dsn, "migrate", "embed", *EMBED)["embedded"] == 0


def test_an_erased_user_is_in_no_work_folder_any_more(dsn: str, tmp_path: Path) -> None:
    users = {memory.user_id for memory in corpus.memories()[:50]}
    path = export(tmp_path / "export.json", 50)
    first = ok(dsn, "migrate", "run", "--from", "file", "--input", str(path), "--no-checkpoint")
    other = export(tmp_path / "other.json", 3, user_id="somebody")
    second = ok(
        dsn, "migrate", "run", "--from", "file", "--input", str(other), "--no-checkpoint", "--on-conflict", "new-id"
    )
    victim = sorted(users)[0]
    erase = ("user", "erase", victim, "--reason", "request 7", "--yes")
    assert ok(dsn, *erase, "--dry-run")["migrations_cleared"] == [first["run"]]
    assert ok(dsn, *erase)["migrations_cleared"] == [first["run"]]
    runs = {run["name"]: run["state"] for run in ok(dsn, "migrate", "status")}
    assert runs == {first["run"]: "cleared", second["run"]: "complete"}
    left = [path for path in (migrations_folder("dev", dsn) / first["run"]).rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"run.json", "cleared.json"}
    refused(9, "went with a user", dsn, "migrate", "compare", first["run"])
    refused(9, "went with a user", dsn, "migrate", "resume", first["run"])
    # Whoever was erased does not come back by the same source.
    again = ok(dsn, "migrate", "run", "--from", "file", "--input", str(path), "--no-checkpoint")
    assert again["reasons"] == {"erased-user": sum(memory.user_id == victim for memory in corpus.memories()[:50])}


def test_an_endpoint_is_paid_once_also_after_a_run_that_failed(dsn: str, tmp_path: Path, server: Server) -> None:
    path = export(tmp_path / "export.json", 60)
    key = "sk-loopback-for-tests"  # pragma: allowlist secret
    with StrictEmbeddingServer(DIMS, inputs_max=16) as endpoint:
        endpoint.faults += [Fault(429, {"Retry-After": "0"}), Fault(503), Fault(0)]
        model = ("--model", "text-embedding-3-small", "--dims", str(DIMS), "--embedding-url", endpoint.base_url)
        run = ("migrate", "run", "--from", "file", "--input", str(path), *model, "--batch-size", "20")
        assert ok(dsn, *run, OPENAI_API_KEY=key)["inserted"] == 60
        assert set(endpoint.texts.values()) == {1}
        assert len(endpoint.texts) == len({memory.memory for memory in corpus.memories()[:60]})
        with scratch_database(server) as name:
            other = server.admin_dsn(name)
            assert ok(other, *run, "--no-checkpoint", OPENAI_API_KEY=key)["inserted"] == 60
        assert set(endpoint.texts.values()) == {1}, "another database is embedded from the cache"
        assert not [found for found in Path().rglob("*") if found.is_file() and key.encode() in found.read_bytes()]
    refused(9, "cannot be compared", dsn, *run[:6], "--model", "memharbor-hash")
