"""
Backups side by side: `pg_dump` with `psql` as the seeds do it, `pg_basebackup`, and ours.

Works on a stack without memories of anybody's, fills it with made-up ones and leaves it empty again. Every way runs in
the same container against the same rows, one after the other, so that the machine's noise meets all of them; what is
compared are ratios. Ours includes what the others leave out: encryption, checksums, the way over TLS into the store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from memharbor.backup.chain import Request, find_parent
from memharbor.backup.destinations import find_destination
from memharbor.backup.logical import create, snapshot
from memharbor.backup.logical_files import Keys
from memharbor.backup.plan import plan_restore
from memharbor.backup.sandbox import restored
from memharbor.backup.selection import Choice
from memharbor.bench.measure import WORDS, Measure
from memharbor.database import run_statement, translated_errors
from memharbor.errors import ExternalToolError, StateRefusedError
from memharbor.operations import OpenStack
from memharbor.output import Output
from memharbor.server_files.postgres import DATA_ROOT
from memharbor.target import Target

# Beside the data directory: on the same disk, and inside of no backup.
_WORK = f"{DATA_ROOT}/bench"
_USER = "bench-user-7"
_FILL = """
insert into memharbor.memories (payload, embedding)
select
  jsonb_build_object('user_id', 'bench-user-' || n %% %(users)s, 'data', (
    -- `place` makes the aggregate the inner query's.
    select string_agg(words[1 + (floor(random() * array_length(words, 1))::int + place) %% array_length(words, 1)], ' ')
    from generate_series(1, 12) place where n > 0
  )),
  (select array_agg((random() * 2 - 1)::real) from generate_series(1, %(dims)s) where n > 0)::vector
from generate_series(1, %(rows)s) n, string_to_array(%(words)s, ' ') words
"""
_CHANGE = """
update memharbor.memories set payload = payload || '{"changed": true}'
where id in (select id from memharbor.memories order by md5(id::text || %s) limit %s)
"""
_DUMP = f"pg_dump --format=plain --dbname=$0 > {_WORK}/dump.sql && wc -c < {_WORK}/dump.sql"
_LOAD = (
    "dropdb --if-exists memharbor_bench && createdb memharbor_bench && psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 "
    f"--dbname=memharbor_bench --file={_WORK}/dump.sql > /dev/null; code=$?; dropdb --if-exists memharbor_bench; exit $code"
)
_BASE = (
    f"rm -rf {_WORK}/base && pg_basebackup --pgdata={_WORK}/base --checkpoint=fast --wal-method=stream && "
    f"du -sb {_WORK}/base | cut -f 1"
)
# Copied back, started aside and asked, as a person would.
_BASE_BACK = f"""
set -eu
rm -rf {_WORK}/back; cp -a {_WORK}/base {_WORK}/back; chmod 0700 {_WORK}/back
pg_ctl start --pgdata={_WORK}/back --wait --silent --log={_WORK}/log --options="-c config_file=/etc/memharbor/postgres/postgresql.conf \
-c hba_file=/etc/memharbor/postgres/pg_hba.conf -c archive_mode=off -c listen_addresses= -c port=5999 -c shared_buffers=32MB"
psql --no-psqlrc --quiet --port=5999 --dbname="$0" --command "select count(*) from memharbor.memories" > /dev/null
pg_ctl stop --pgdata={_WORK}/back --silent --mode=immediate
"""  # noqa: S608 - a script of the shell, of constants only
_ONE_USER = f"""
psql --no-psqlrc --quiet --dbname="$0" --set=user={_USER} > {_WORK}/user.txt << 'end'
copy (select * from memharbor.memories where user_id = :'user') to stdout;
end
wc -c < {_WORK}/user.txt
"""  # noqa: S608 - a script of the shell, of constants only


@dataclass
class BackupBench:
    """
    One run of the comparison.

    Args:
        opened: The stack.
        target: Its database.
        output: Where progress is said.
    """

    opened: OpenStack
    target: Target
    output: Output

    def run(self, *, rows: int, users: int) -> list[Measure]:
        """
        Fill, measure, and leave the stack as empty as it was. Its backups stay, until they are pruned.

        Args:
            rows: Memories to make.
            users: Users that they belong to.

        Raises:
            StateRefusedError: The stack holds memories, which a benchmark must not touch.
        """
        self.refuse_memories()
        try:
            with self.output.step(f"Fill in {rows:,} memories of {users:,} users"):
                self._execute(_FILL, {"rows": rows, "users": users, "dims": self._dims, "words": WORDS})
                # Else the first reader marks every page, and everything has changed since the full backup.
                self._execute("vacuum (freeze, analyze) memharbor.memories, memharbor.memory_history", None)
            with tempfile.TemporaryDirectory(prefix="memharbor-bench-") as folder:
                return self._measure(rows, Path(folder))
        finally:
            with self.output.step("Tidy up"):
                self._shell(f"rm -rf {_WORK}; dropdb --if-exists memharbor_bench")
                self._execute("delete from memharbor.memories where user_id like 'bench-user-%%'", None)
                self._execute("delete from memharbor.memory_history where user_id like 'bench-user-%%'", None)

    @property
    def _dims(self) -> int:
        return self.target.settings.embedding_dims

    def _measure(self, rows: int, folder: Path) -> list[Measure]:
        self._shell(f"rm -rf {_WORK}; mkdir -m 0700 {_WORK}")
        measures = [
            self._by_shell("full", "pg_dump, plain", _DUMP),
            self._by_shell("full", "pg_basebackup", _BASE),
            self._by_engine("full", "backup create --type full", "full"),
            self._logical("full", folder, Choice()),
        ]
        self._execute(_CHANGE, ("1", max(1, rows // 100)))
        measures += [
            self._by_shell("1 % changed", "pg_dump, plain", _DUMP),
            self._by_shell("1 % changed", "pg_basebackup", _BASE),
            self._by_engine("1 % changed", "backup create --type incr", "incr"),
            self._logical("1 % changed", folder, Choice(), incremental=True),
            self._by_shell("one user", "psql, copy to text", _ONE_USER),
            self._logical("one user", folder, Choice(user_id=_USER)),
            self._by_shell("restore", "psql < dump", _LOAD),
            self._by_shell("restore", "pg_basebackup, copied back and started", _BASE_BACK),
            self._sandbox(),
        ]
        return measures

    def _by_shell(self, work: str, way: str, script: str) -> Measure:
        return self._timed(work, way, lambda: self._shell(script))

    def _by_engine(self, work: str, way: str, backup_type: str) -> Measure:
        return self._timed(work, way, lambda: self.opened.engine.create_backup(backup_type).stored_bytes)  # type: ignore[arg-type]

    def _logical(self, work: str, folder: Path, choice: Choice, *, incremental: bool = False) -> Measure:
        def take() -> int:
            destination = find_destination(str(folder))
            with self.target.connect(autocommit=True) as connection, ExitStack() as stack:
                request = Request(self.target.settings.database, choice, Keys())
                if incremental:
                    parent = find_parent(destination, request, None, stack)
                    request = Request(request.database, choice, request.keys, parent)
                with snapshot(connection) as source:
                    manifest = create(source, request, destination, self.output)
            return sum(file.stat().st_size for file in (folder / manifest.id).rglob("*") if file.is_file())

        way = "backup create --type logical" + (" --since" if incremental else " --user" if choice.user_id else "")
        return self._timed(work, way, take)

    def _sandbox(self) -> Measure:
        def restore() -> None:
            plan = plan_restore(self.opened.engine, at=None, name=None)
            with restored(self.opened, plan, self.output) as sandbox:
                sandbox.rows().query("select count(*) from memharbor.memories")

        return self._timed("restore", "restore of full and incr, replayed and started", restore)

    def _timed(self, work: str, way: str, do: Callable[[], int | str | None]) -> Measure:
        begun_at = time.monotonic()
        with self.output.step(f"{work}: {way}"):
            said = do()
        seconds = time.monotonic() - begun_at
        return Measure(work, way, seconds, int(said) if said not in (None, "") else None)

    def _shell(self, script: str) -> str:
        done = self.opened.containers.execute(
            self.opened.engine.container, ["sh", "-c", script, self.target.settings.database]
        )
        if done.exit_code != 0:
            raise ExternalToolError(f"a step of the benchmark failed: {done.last_words}")
        return done.stdout.strip()

    def _execute(self, statement: str, values: object) -> None:
        with translated_errors("the benchmark's rows"), self.target.connect(autocommit=True) as connection:
            run_statement(connection, "set statement_timeout = 0")
            connection.execute(statement, values)  # type: ignore[call-overload]

    def refuse_memories(self) -> None:
        """
        Refuse a stack that holds memories of anybody's.

        Raises:
            StateRefusedError: It does.
        """
        with translated_errors("looking for memories"), self.target.connect(autocommit=True) as connection:
            row = connection.execute(
                "select exists (select from memharbor.memories where user_id is null or user_id not like 'bench-user-%')"
            ).fetchone()
        if row is None or row[0]:
            raise StateRefusedError(
                f"{self.target.name} holds memories, and the benchmark fills the stack and empties it again",
                hint="make a stack for it: make up STACK=bench",
            )
