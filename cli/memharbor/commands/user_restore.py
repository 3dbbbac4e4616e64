"""The two ways of `memharbor user restore`: from a moment of the archive, and from a logical backup."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memharbor.commands import confirm
from memharbor.commands.backup_logical import DEFAULT_DESTINATION, merge_into, say_merge
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.backup.chain import Link


def restore_moment(output: Output, user_id: str, options: dict[str, Any]) -> None:
    """
    Restore a user as they were at a moment.

    Args:
        output: Where it is said.
        user_id: Whom.
        options: Those of the command.
    """
    from datetime import UTC, datetime

    from memharbor.backup.plan import parse_instant
    from memharbor.backup.records import Records
    from memharbor.backup.user import erasures_of, extracted_user, refuse_erased
    from memharbor.operations import open_stack

    at = parse_instant(options["at"], now=datetime.now(UTC))
    opened = open_stack(options["stack"])
    refuse_erased(user_id, at, erasures_of(Records(opened.engine)))
    if options["into"] == "file":
        _write_file(output, opened, user_id, at, options)
        return
    if not options["dry_run"]:
        confirm(f"Merge user `{user_id}` as of {at.isoformat()} into stack {options['stack']}?", yes=options["yes"])
    _merge(output, extracted_user(opened, user_id, at, output), user_id, options)


def _write_file(output: Output, opened: Any, user_id: str, at: Any, options: dict[str, Any]) -> None:
    from memharbor.backup.chain import describe
    from memharbor.backup.destinations import find_destination
    from memharbor.backup.user import extract_user

    place = options["destination"] or DEFAULT_DESTINATION
    if options["dry_run"]:
        output.result({"dry_run": True, "destination": place}, f"would write user `{user_id}` to {place}")
        return
    destination = find_destination(place)
    data = describe(extract_user(opened, user_id, at, destination, output), destination)
    output.result(data, data["place"])


def restore_place(output: Output, place: str, options: dict[str, Any]) -> None:
    """
    Restore a user from a logical backup.

    Args:
        output: Where it is said.
        place: The backup.
        options: Those of the command.
    """
    from memharbor.backup.user import opened_backup
    from memharbor.errors import UsageError

    if "://" not in place and not Path(place).exists():
        raise UsageError(
            f"`{place}` is no logical backup",
            hint=f"of a user, say the moment too: `memharbor user restore {place} --at TIME`",
        )
    if options["into"] == "file":
        raise UsageError("`--into file` needs `--at`: a logical backup is a file already")
    if not options["dry_run"]:
        confirm(f"Merge one user of `{place}` into stack {options['stack']}?", yes=options["yes"])
    _merge(output, opened_backup(place), options["user_id"], options)


def _merge(
    output: Output, backup: AbstractContextManager[list[Link]], user: str | None, options: dict[str, Any]
) -> None:
    from memharbor.backup.erasure import user_digest
    from memharbor.backup.logical_files import read_keys
    from memharbor.backup.user import check_new_owner
    from memharbor.errors import UsageError
    from memharbor.target import find_target

    target = find_target(options["stack"], options["dsn"])
    keys = read_keys(identity_file=options["identity_file"])
    new_owner = None if options["into"] == "live" else check_new_owner(options["into"])
    with backup as chain:
        digest = user_digest(user) if user else chain[-1].manifest.selection.user_sha256
        if digest is None:
            raise UsageError("the backup holds more than one user", hint="say which one with `--user ID`")
        report = merge_into(
            output,
            target,
            chain,
            keys,
            dry_run=options["dry_run"],
            what="user-restore",
            on_conflict=options["on_conflict"] or ("new-id" if new_owner else "skip"),
            user_sha256=digest,
            new_owner=new_owner,
        )
    say_merge(output, report.as_data())
