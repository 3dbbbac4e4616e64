"""
Migrations from end to end, at several sizes: a file of texts, embedded by an endpoint on this machine, loaded, compared.

Each run is a process of its own, so that its peak memory is its own; the endpoint is another one, so that its work is not
taken for ours.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import httpx

from memharbor.bench.measure import Measure
from memharbor.bench.migrate import made_text, remove_rows
from memharbor.database import translated_errors
from memharbor.embedder import EmbeddingServer
from memharbor.migrate.embedding.local import HASH_MODEL
from memharbor.migrate.opening import EmbeddingSpec, SourceSpec, open_embedder
from memharbor.migrate.recorded_model import MODEL_KEY
from memharbor.migrate.rehearsal import compare_run
from memharbor.migrate.runs import RunSettings, opened_run
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output
from memharbor.target import Target

# What the built-in embedder is called where it is an endpoint like any other.
_MODEL = f"{HASH_MODEL}-endpoint"


@dataclass(frozen=True)
class WholeRun:
    """
    One migration.

    Args:
        rows: Memories.
        run_seconds: Of `migrate run`, embedding included.
        compare_seconds: Of `migrate compare` after it.
        peak_memory_bytes: The most memory that the process has had.
        differences: That `migrate compare` found.
    """

    rows: int
    run_seconds: float
    compare_seconds: float
    peak_memory_bytes: int
    differences: int


def run_sizes(target: Target, output: Output, sizes: Sequence[int]) -> Iterator[WholeRun]:
    """
    Migrate files of so many memories into an empty database, and leave it as empty.

    Args:
        target: The database.
        output: Where progress is said.
        sizes: Memories of each file.
    """
    with served_embedder(target.settings.embedding_dims) as url, tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            path = Path(folder) / f"{rows}.jsonl"
            _write_texts(path, rows)
            with output.step(f"Migrate {rows:,} memories"):
                yield _in_a_process(target, path, url, rows)
            with closing(target.connect(autocommit=True)) as connection:
                remove_rows(connection)
                with translated_errors("tidying up"):
                    statement = "delete from memharbor.configs where key = %s and value ->> 'model' = %s"
                    connection.execute(statement, (MODEL_KEY, _MODEL))


def embed_both_ways(target: Target, output: Output, rows: int) -> list[Measure]:
    """
    Embed texts one request each, as the seeds' script does, and as `migrate` does.

    Args:
        target: Its settings say the dimensions.
        output: Where progress is said.
        rows: Texts.
    """
    dims = target.settings.embedding_dims
    draw = random.Random(20261121)  # noqa: S311 - made-up rows
    texts = [made_text(draw, number) for number in range(rows)]
    with served_embedder(dims) as url, tempfile.TemporaryDirectory() as cache:
        with output.step("Embed, a request for each text"), httpx.Client(trust_env=False) as client:
            begun_at = time.monotonic()
            for text in texts:
                client.post(f"{url}/embeddings", json={"model": _MODEL, "input": text}).raise_for_status()
            single = Measure("embed", "a request for each text", time.monotonic() - begun_at)
        with output.step("Embed in batches"), open_embedder(EmbeddingSpec(_MODEL, dims, url, cache=cache)) as embedder:
            begun_at = time.monotonic()
            embedder.embed(texts)
            return [single, Measure("embed", "migrate, the embed step", time.monotonic() - begun_at)]


@contextmanager
def served_embedder(dims: int) -> Iterator[str]:
    """Serve the built-in embedder by a process of its own; lends its address."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, dims), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(timeout=10)


def _serve(pipe: Pipe, dims: int) -> None:
    with EmbeddingServer(dims) as server:
        pipe.send(server.base_url)
        pipe.recv()


def _write_texts(path: Path, rows: int) -> None:
    draw = random.Random(rows)  # noqa: S311 - made-up rows
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            line = {"id": f"mem_{number}", "memory": made_text(draw, number), "user_id": f"bench-user-{number % 500}"}
            file.write(json.dumps({**line, "created_at": "2025-01-15T10:00:00Z"}) + "\n")


def _in_a_process(target: Target, path: Path, url: str, rows: int) -> WholeRun:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_migrate, args=(theirs, target, path, url))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    finally:
        process.join()
    return WholeRun(rows, **found)


def _migrate(pipe: Pipe, target: Target, path: Path, url: str) -> None:
    output = Output()
    embedding = EmbeddingSpec(_MODEL, target.settings.embedding_dims, url, cache=str(path.parent / "cache"))
    settings = RunSettings(SourceSpec("file", (str(path),)), embedding=embedding)
    folder = WorkFolder(path.parent / f"run-{path.stem}")
    begun_at = time.monotonic()
    with opened_run(folder, target, output, settings=settings) as opened:
        opened.carry_out("verify")
    run_seconds = time.monotonic() - begun_at
    begun_at = time.monotonic()
    compared = compare_run(folder, target, output)
    peak = _peak_memory_bytes()
    pipe.send(
        {
            "run_seconds": run_seconds,
            "compare_seconds": time.monotonic() - begun_at,
            "peak_memory_bytes": peak,
            "differences": sum(compared[what] for what in ("missing", "extra", "different")),
        }
    )


def _peak_memory_bytes() -> int:
    """Tell the most memory that this process has had since it began its program. Source: proc_pid_status(5), VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
