"""
What is done with a run but carrying it out: rehearse it, plan it by a sample, compare it; and embed a database.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memharbor.errors import StateRefusedError
from memharbor.migrate.compare import Difference, compare_databases, summarise
from memharbor.migrate.embedding.model import check_fit
from memharbor.migrate.embedding.rows import RowChoice
from memharbor.migrate.load import Loader
from memharbor.migrate.opening import EmbeddingSpec, open_embedder
from memharbor.migrate.pipeline import Report
from memharbor.migrate.planning import MigrationPlan, make_plan
from memharbor.migrate.record import record_from_data
from memharbor.migrate.recorded_model import read_model
from memharbor.migrate.reembed import EmbedReport, embed_rows, foretell_rows
from memharbor.migrate.run_folders import refuse_cleared
from memharbor.migrate.runs import RunSettings, opened_run
from memharbor.migrate.sampling import Sample, time_local_model, try_sample
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


def rehearse(settings: RunSettings, target: Target, output: Output) -> Report:
    """
    Foretell exactly what a run would do; nothing is embedded, and nothing remains of it.

    Args:
        settings: Of the run.
        target: The database that it would load into.
        output: Where progress is said.
    """
    with TemporaryDirectory(prefix="memharbor-") as scratch:
        folder = WorkFolder(Path(scratch) / "run")
        with opened_run(folder, target, output, settings=settings, needs_embeddings=False) as opened:
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
            sample = Sample(opened.source, size)
            with output.step(f"Try the first {size:,} items"):
                tried = try_sample(opened, folder, sample)
            # A file tells only so; a service that does not tell is not asked for everything.
            if not opened.info.counts and opened.info.size_bytes is not None:
                with output.step("Count the items"):
                    sample.count_rest()
            seconds = time_local_model(settings.embedding, tried.texts.some, Path(scratch) / "cache")
            return make_plan(opened.info, sample, tried, settings, seconds)


def compare_run(folder: WorkFolder, target: Target, output: Output) -> dict[str, Any]:
    """
    Compare what a run carried with what the database has.

    Returns:
        What `memharbor.migrate.compare.summarise` gives.

    Raises:
        StateRefusedError: The run was stopped before all that it carries was ready.
    """
    refuse_cleared(folder)
    run = folder.read_run()
    if not folder.is_read() or folder.segments("embedded") != folder.segments("read"):
        raise StateRefusedError(
            f"run {folder.path.name} was stopped before everything was read and embedded",
            hint=f"memharbor migrate resume {folder.path.name}",
        )
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
        What `memharbor.migrate.compare.compare_databases` gives.
    """
    with closing(first.connect(autocommit=True)) as mine, closing(second.connect(autocommit=True)) as theirs:
        return compare_databases(mine, theirs)


def embed_database(
    target: Target, spec: EmbeddingSpec, output: Output, *, choice: RowChoice, dry_run: bool
) -> EmbedReport:
    """
    Embed what is in a database.

    Args:
        target: The database.
        spec: Which model.
        output: Where progress is said.
        choice: Which rows.
        dry_run: Only say what would be done.

    Raises:
        UsageError: An id of the choice is none.
        ConfigError: The model's embeddings do not fit the schema.
        StateRefusedError: Another model made the embeddings that are there, and some of them would stay.
    """
    with closing(target.connect(autocommit=True)) as connection:
        check_fit(
            spec.model,
            spec.dims,
            schema_dims=target.settings.embedding_dims,
            schema_distance=target.settings.embedding_distance,
            recorded_model=None if choice.is_everything else read_model(connection),
        )
        if dry_run:
            return foretell_rows(connection, choice, spec.model)
        with open_embedder(spec) as embedder:
            return embed_rows(connection, target.settings, embedder, output, choice)
