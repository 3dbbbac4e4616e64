"""`memharbor schema`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    import psycopg

    from memharbor.schema import ApplyReport, PlannedStep
    from memharbor.settings import Settings
    from memharbor.target import Target

# As in memharbor.schema.COMPONENTS, spelled out because importing that takes longer than printing a help text.
_COMPONENTS = ("roles", "settings", "extension", "tables", "indexes", "policies")


@click.group()
def schema() -> None:
    """Render, plan, apply and verify the schema."""


def _part_option(part: str, what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        leave_out = click.option(f"--no-include-{part}", is_flag=True, help=f"Leave {what} out.")
        include = click.option(
            f"--include-{part}",
            type=click.BOOL,
            is_flag=False,
            flag_value="true",
            default=True,
            show_default=True,
            metavar="[BOOLEAN]",
            help=f"Include {what}.",
        )
        return include(leave_out(command))

    return decorate


@schema.command()
@click.option("--dimensions", type=int, help="Dimensions of every embedding.  [default: the setting embedding_dims]")
@_part_option("graph", "the memory graph")
@_part_option("history", "the audit trail")
@dsn_option
@stack_option
@common_options
def render(output: Output, stack: str, dsn: str | None, dimensions: int | None, **parts: bool) -> None:
    """
    Print the whole schema as one script for psql.

    Nothing is connected to and the script holds no secret. It may run twice, and Memharbor can take over afterwards.

    \b
    Example:
      memharbor schema render --dimensions 1536 --include-graph true > schema.sql
    """
    from memharbor.schema import render_script

    settings = _settings_to_render(output, stack, dsn, dimensions)
    text = render_script(
        settings,
        include_graph=parts["include_graph"] and not parts["no_include_graph"],
        include_history=parts["include_history"] and not parts["no_include_history"],
    )
    output.result({"sql": text}, text)


def _settings_to_render(output: Output, stack: str, dsn: str | None, dimensions: int | None) -> Settings:
    import os

    from memharbor.errors import ConfigError
    from memharbor.settings import load_settings, settings_from_environment
    from memharbor.target import find_target

    option = {} if dimensions is None else {"embedding_dims": dimensions}
    try:
        known: dict[str, Any] = find_target(stack, dsn).settings.model_dump()
    except ConfigError as exc:
        output.detail(exc.message)
        known = dict(settings_from_environment(os.environ))
    return load_settings(("option", option), ("environment", known))[0]


@schema.command()
@click.option("--component", "components", multiple=True, type=click.Choice(_COMPONENTS[1:]), help="Only this part.")
@click.option("--exit-code", is_flag=True, help="Exit with 11 when there is something to do.")
@dsn_option
@stack_option
@common_options
def plan(output: Output, stack: str, dsn: str | None, components: tuple[str, ...], exit_code: bool) -> int:
    """
    Show which steps `schema apply` would run, and change nothing.

    Roles, the database itself and users' vector indexes are no steps: `schema apply --dry-run` shows them too.

    \b
    Example:
      memharbor schema plan --exit-code
    """
    from contextlib import nullcontext

    from memharbor import schema as library
    from memharbor.errors import ChangesPendingError
    from memharbor.rollout import connect_if_exists
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    connection = connect_if_exists(target)
    with nullcontext() if connection is None else closing(connection):
        steps = library.plan(connection, target.settings, components=components or None)
    rows = [
        {"step": item.name, "component": item.step.component, "state": item.state, "reason": item.reason}
        for item in steps
    ]
    output.table(rows, ["step", "component", "state", "reason"])
    return ChangesPendingError.exit_code if exit_code and any(item.state != "applied" for item in steps) else 0


@schema.command()
@click.option("--component", "components", multiple=True, type=click.Choice(_COMPONENTS), help="Only this part.")
@click.option("--adopt-drift", is_flag=True, help="Accept what was changed outside Memharbor as it is.")
@dry_run_option
@dsn_option
@stack_option
@common_options
def apply(
    output: Output, stack: str, dsn: str | None, components: tuple[str, ...], adopt_drift: bool, dry_run: bool
) -> None:
    """
    Create or repair roles, database and schema. A second run changes nothing.

    \b
    Example:
      memharbor schema apply --dry-run
    """
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    changes: list[dict[str, str]] = []
    if not components or "roles" in components:
        changes += _apply_roles(output, target, dry_run=dry_run)
    ledgered = tuple(name for name in components if name != "roles")
    if not components or ledgered:
        changes += _apply_steps(output, target, ledgered or None, adopt_drift=adopt_drift, dry_run=dry_run)
    if not components or "indexes" in components:
        changes += _apply_tenant_indexes(output, target, dry_run=dry_run)
    _say(output, changes, dry_run=dry_run)


@schema.command()
@dry_run_option
@dsn_option
@stack_option
@common_options
def upgrade(output: Output, stack: str, dsn: str | None, dry_run: bool) -> None:
    """
    Apply every step of the schema that is missing or changed.

    Like `schema apply`, without roles and users' vector indexes.

    \b
    Example:
      memharbor schema upgrade
    """
    from memharbor.target import find_target

    changes = _apply_steps(output, find_target(stack, dsn), None, adopt_drift=False, dry_run=dry_run)
    _say(output, changes, dry_run=dry_run)


def _say(output: Output, changes: list[dict[str, str]], *, dry_run: bool) -> None:
    if dry_run:
        changes = [{**row, "change": foretell(row["change"])} for row in changes]
    output.table(changes, ["component", "change"], empty="nothing would change" if dry_run else "nothing changed")


def foretell(change: str) -> str:
    """
    Say of a change that it would be.

    >>> foretell("role memharbor_app was added"), foretell("table memharbor.was is gone")
    ('role memharbor_app would be added', 'table memharbor.was would be gone')
    """
    import re

    return re.sub(r" (?:was|is) (?=(?:added|changed|gone|given its password)$)", " would be ", change)


def _connect(target: Target) -> psycopg.Connection[Any]:
    return target.connect(dbname=target.settings.database)


def _apply_roles(output: Output, target: Target, *, dry_run: bool) -> list[dict[str, str]]:
    from memharbor import schema as library

    report = library.apply_roles(
        lambda database: target.connect(dbname=database), target.settings, target.passwords, dry_run=dry_run
    )
    for notice in report.notices:
        output.note(f"skipped: {notice}")
    changes = list(report.details)
    with closing(target.connect(dbname=library.MAINTENANCE_DATABASE)) as connection:
        if library.ensure_database(connection, target.settings, dry_run=dry_run):
            changes.append(f"database {target.settings.database} was added")
    return [{"component": "roles", "change": change} for change in changes]


def _apply_steps(
    output: Output, target: Target, components: tuple[str, ...] | None, *, adopt_drift: bool, dry_run: bool
) -> list[dict[str, str]]:
    from memharbor import schema as library
    from memharbor.rollout import connect_if_exists

    def progress(item: PlannedStep, number: int, total: int) -> None:
        output.note(f"[{number}/{total}] {item.step.component}: {item.name} ({item.reason})")

    connection = connect_if_exists(target) if dry_run else _connect(target)
    if connection is None:
        planned = library.plan(None, target.settings, components=components)
        return [{"component": item.step.component, "change": f"step {item.name} would run"} for item in planned]
    with closing(connection):
        report = library.apply(
            connection,
            target.settings,
            components=components,
            adopt_drift=adopt_drift,
            dry_run=dry_run,
            progress=progress,
        )
    return _described(output, report)


def _described(output: Output, report: ApplyReport) -> list[dict[str, str]]:
    for notice in report.notices:
        output.note(f"skipped: {notice}")
    if report.dry_run and not report.differences:
        return [{"component": "schema", "change": f"step {name} would run"} for name in report.applied]
    return [{"component": "schema", "change": str(difference)} for difference in report.differences]


def _apply_tenant_indexes(output: Output, target: Target, *, dry_run: bool) -> list[dict[str, str]]:
    from memharbor import schema as library
    from memharbor.rollout import connect_if_exists

    def progress(verb: str, index_name: str, number: int, total: int) -> None:
        output.note(f"[{number}/{total}] {verb} the vector index {index_name}")

    connection = connect_if_exists(target) if dry_run else _connect(target)
    if connection is None:
        return []
    with closing(connection):
        report = library.tenant_indexes(connection, target.settings, dry_run=dry_run, progress=progress)
    made = [f"vector index {index.index_name} of {index.row_count:,} rows was added" for index in report.created]
    gone = [f"vector index {index.index_name} is gone" for index in report.dropped]
    left = [f"invalid index {name} is gone" for name in report.repaired]
    return [{"component": "indexes", "change": change} for change in left + made + gone]


@schema.command()
@dsn_option
@stack_option
@common_options
def verify(output: Output, stack: str, dsn: str | None) -> int:
    """
    Check the database against what was rolled out, and say what differs.

    Exits with 10 when something does.

    \b
    Example:
      memharbor schema verify
    """
    from dataclasses import asdict

    from memharbor import schema as library
    from memharbor.errors import VerificationError
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    with closing(_connect(target)) as connection:
        findings = library.verify(connection, target.settings, connect=lambda database: target.connect(dbname=database))
    rows = [asdict(finding) for finding in findings]
    output.table(rows, ["kind", "message", "hint"], empty="everything is as it was rolled out")
    return VerificationError.exit_code if findings else 0


@schema.command()
@dsn_option
@stack_option
@common_options
def current(output: Output, stack: str, dsn: str | None) -> None:
    """
    Name the newest versioned step that is applied.

    \b
    Example:
      memharbor schema current
    """
    from memharbor import schema as library
    from memharbor.target import find_target

    with closing(_connect(find_target(stack, dsn))) as connection:
        name = library.current(connection)
    output.result({"current": name}, name or "none")


@schema.command()
@dsn_option
@stack_option
@common_options
def history(output: Output, stack: str, dsn: str | None) -> None:
    """
    List every step that was ever applied or taken back, oldest first.

    \b
    Example:
      memharbor schema history
    """
    from dataclasses import asdict

    from memharbor import schema as library
    from memharbor.target import find_target

    with closing(_connect(find_target(stack, dsn))) as connection:
        entries = library.history(connection)
    output.table(
        [asdict(entry) for entry in entries], ["applied_at", "name", "direction", "applied_by", "execution_ms"]
    )


@schema.command(context_settings={"ignore_unknown_options": True})
@click.argument("target_step", metavar="-N|STEP|base")
@click.option("--allow-data-loss", is_flag=True, help="Drop tables that hold rows.")
@yes_option
@dry_run_option
@dsn_option
@stack_option
@common_options
def downgrade(
    output: Output, stack: str, dsn: str | None, target_step: str, allow_data_loss: bool, yes: bool, dry_run: bool
) -> None:
    """
    Take back the last N versioned steps, or all after STEP, or all.

    \b
    Example:
      memharbor schema downgrade -1 --dry-run
    """
    from dataclasses import asdict

    from memharbor import schema as library
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    back = target_step.removeprefix("-")
    chosen = {"steps": int(back)} if target_step != back and back.isdigit() else {"to": target_step}
    with closing(target.connect()) as connection:
        if not dry_run:
            confirm(f"Take the schema of {target.name} back to {target_step}?", yes=yes)
        report = library.downgrade(
            connection, target.settings, **chosen, allow_data_loss=allow_data_loss, dry_run=dry_run
        )
    lines = [f"{'would take' if dry_run else 'took'} back {name}" for name in report.reverted]
    lines += [f"with {count:,} rows of memharbor.{table}" for table, count in report.rows_lost.items()]
    output.result(asdict(report), "\n".join(lines) or "nothing to take back")
    if report.reverted and not dry_run:
        output.note(
            "hint: applications see nothing until `memharbor schema apply` runs, of this release or an older one"
        )
