"""
What is done with a run but carrying it out: rehearse it, plan it by a sample, compare it; and embed a database.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memharbor.migrate.compare import Difference, compare_databases, summarise
from memharbor.migrate.load import Loader
from memharbor.migrate.opening import EmbeddingSpec, open_embedder
from memharbor.migrate.pipeline import Pipeline, Report
from memharbor.migrate.planning import MigrationPlan, Sample, make_plan, reckon_items
from memharbor.migrate.record import Record, record_from_data
from memharbor.migrate.reembed import EmbedReport, Filter, embed_rows
from memharbor.migrate.runs import RunSettings, opened_run, read_model, refuse_cleared, refuse_other_model
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output
from memharbor.target import Target

_TABLES = {
    "memory": "memories",
    "entity": "entities",
    "relationship": "memory_relationships",
    "history": "memory_history",
}
_WORDS = {"insert": "missing", "dangling": "missing"}


def rehearse(settings: RunSettings, target: Target, output: Output, *, source_name: str | None = None) -> Report:
    """
    Foretell exactly what a run would do; nothing is embedded, and nothing remains of it.

    Args:
        settings: Of the run.
        target: The database that it would load into.
        output: Where progress is said.
        source_name: Of the run that is retried.
    """
    with TemporaryDirectory(prefix="memharbor-") as scratch:
        folder = WorkFolder(Path(scratch) / "run")
        with opened_run(
            folder, target, output, settings=settings, source_name=source_name, needs_embeddings=False
        ) as opened:
            return opened.carry_out("load", dry_run=True)


def rehearse_sample(settings: RunSettings, target: Target, output: Output, *, size: int) -> MigrationPlan:
    """
    Rehearse the first items of a run, and reckon the whole from them.

    Args:
        settings: Of the run.
        target: The database that it would load into.
        output: Where progress is said.
        size: Items at most.
    """
    with TemporaryDirectory(prefix="memharbor-") as scratch:
        folder = WorkFolder(Path(scratch) / "run")
        with opened_run(folder, target, output, settings=settings, needs_embeddings=False) as opened:
            plan = replace(opened.pipeline.plan, source=Sample(opened.source, size))
            begun_at = time.monotonic()
            with output.step(f"Try the first {size:,} items"):
                sampled = replace(opened, pipeline=Pipeline(folder, plan, output))
                report = sampled.carry_out("load", dry_run=True)
            texts = [record.text for record in _records(folder) if record.embedding is None and record.text]
            model = settings.embedding.model if settings.embedding else None
            lines = (line for number in folder.segments("read") for line in folder.read_segment("read", number))
            size_bytes = sum(len(json.dumps(line.get("data", line))) for line in lines)
            count = reckon_items(opened.info, size_bytes, report.counts["read"], size)
            return make_plan(opened.info, report, texts, begun_at, model, count)


def _records(folder: WorkFolder) -> Iterator[Record]:
    for number in folder.segments("embedded"):
        yield from (record_from_data(line) for line in folder.read_segment("embedded", number) if "kind" in line)


def compare_run(folder: WorkFolder, target: Target, output: Output) -> dict[str, Any]:
    """
    Compare what a run carried with what the database has.

    Returns:
        What `memharbor.migrate.compare.summarise` gives.
    """
    refuse_cleared(folder)
    run = folder.read_run()
    with closing(target.connect(autocommit=True)) as connection:
        loader = Loader(connection, target.settings, uuid.UUID(run["run_id"]), run["source"]["name"], "skip")
        return summarise(_differences(folder, loader, output))


def _differences(folder: WorkFolder, loader: Loader, output: Output) -> Iterator[Difference]:
    numbers = folder.segments("embedded")
    with output.percent() as on_percent:
        for done, number in enumerate(numbers, start=1):
            lines = folder.read_segment("embedded", number)
            records = [record_from_data(line) for line in lines if "kind" in line]
            loaded = folder.read_json(f"loaded/{number:06}.json") or {"refused": [], "renumbered": {}}
            left_out = {each["place"] for each in loaded["refused"]}
            for place, new_id in loaded["renumbered"].items():
                records[int(place)] = replace(records[int(place)], id=uuid.UUID(new_id))
            for place, verdict in loader.judge(records):
                if place not in left_out:
                    record = records[place]
                    yield Difference(_TABLES[record.kind], str(record.id), _WORDS.get(verdict, "different"))
            on_percent(100 * done / len(numbers))


def compare_stacks(first: Target, second: Target) -> dict[str, Any]:
    """
    Compare two databases, row by row where they differ.

    Returns:
        What `memharbor.migrate.compare.summarise` gives.
    """
    with closing(first.connect(autocommit=True)) as mine, closing(second.connect(autocommit=True)) as theirs:
        return summarise(compare_databases(mine, theirs))


def embed_database(
    target: Target,
    spec: EmbeddingSpec | None,
    output: Output,
    *,
    only: Filter,
    user_id: str | None,
    dry_run: bool,
) -> EmbedReport:
    """
    Embed what is in a database.

    Args:
        target: The database.
        spec: Which model.
        output: Where progress is said.
        only: Which rows.
        user_id: Only this user's.
        dry_run: Only count.

    Raises:
        StateRefusedError: Another model made the embeddings that are there, and they would stay.
    """
    with closing(target.connect(autocommit=True)) as connection:
        if spec is not None and (only != "all" or user_id is not None or read_model(connection) is None):
            refuse_other_model(connection, target, spec)
        with open_embedder(spec) if spec is not None and not dry_run else nullcontext() as embedder:
            return embed_rows(connection, target.settings, embedder, output, only=only, user_id=user_id)
