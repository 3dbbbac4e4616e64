"""
The custodian's own command line: JSON lines on stdout, the last one the result or the error.

Called by the schedule of its container and by `memharbor backup purge|undelete|offsite`. One work at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memharbor_custodian.copying import OffsiteCopy
from memharbor_custodian.errors import CustodianError, NotConfiguredError, RefusedError
from memharbor_custodian.keeping import purge, undelete
from memharbor_custodian.places import Place, connect

FILES = Path("/etc/memharbor")
WORK = Path("/run/memharbor")
_LOCK_WAIT_SECONDS = 300


@dataclass(frozen=True)
class Setup:
    """
    What the stack's files say: the two places, and the promises.

    `offsite` is `None` where there is none; `interval` is how often the copy is brought in step.
    """

    stack: str
    keep: timedelta
    store: Place
    offsite: Place | None
    interval: timedelta = timedelta()

    def copy(self) -> OffsiteCopy:
        """
        Give the off-site copy.

        Raises:
            NotConfiguredError: There is none.
        """
        if self.offsite is None:
            raise NotConfiguredError(
                "this stack has no off-site copy",
                hint="set offsite_endpoint, offsite_bucket and the keys as docs/how-to/off-site-copy.md says",
            )
        return OffsiteCopy(self.store, self.offsite, self.stack)


def read_setup(files: Path = FILES) -> Setup:
    """Read the files that the stack gave this container."""
    config = json.loads((files / "custodian/config.json").read_text(encoding="utf-8"))
    keys = json.loads((files / "secrets/custodian.json").read_text(encoding="utf-8"))
    first, second = config["store"], config["offsite"]
    store = Place(
        "backup store",
        connect(first["endpoint"], first["region"], keys["store"], str(files / "tls/ca.crt")),
        first["bucket"],
    )
    offsite = None
    if second is not None:
        private_ca = files / "tls/offsite-ca.crt"
        ca_file = str(private_ca) if private_ca.exists() else None
        offsite = Place(
            "off-site copy",
            connect(second["endpoint"], second["region"], keys["offsite"], ca_file),
            second["bucket"],
            second["folder"],
        )
    interval = timedelta(minutes=second["interval_minutes"] if second is not None else 0)
    return Setup(config["stack"], timedelta(days=config["version_retention_days"]), store, offsite, interval)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="custodian")
    commands = parser.add_subparsers(dest="command", required=True)
    # Without it both places are listed, which takes long where there are many objects.
    commands.add_parser("status").add_argument("--works-only", action="store_true")
    for name in ("purge", "undelete", "copy", "fetch"):
        command = commands.add_parser(name)
        command.add_argument("--dry-run", action="store_true")
    # For tests of the promise, which cannot wait for days.
    commands.choices["purge"].add_argument("--keep-seconds", type=int)
    moment = commands.choices["undelete"].add_mutually_exclusive_group()
    moment.add_argument("--since", type=datetime.fromisoformat)
    moment.add_argument("--at", type=datetime.fromisoformat)
    commands.choices["copy"].add_argument("--accept-changes", action="store_true")
    commands.choices["fetch"].add_argument("--replace", action="store_true")
    commands.choices["fetch"].add_argument("--settle-seconds", type=float, default=0)
    return parser.parse_args(arguments)


def work(options: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Do one work and return its report."""
    now = datetime.now(UTC)
    if options.command == "purge":
        keep = setup.keep if options.keep_seconds is None else timedelta(seconds=options.keep_seconds)
        check = setup.copy().check if setup.offsite is not None else lambda: None
        return purge(setup.store, setup.offsite, now=now, keep=keep, dry_run=options.dry_run, check_copy=check)
    if options.command == "undelete":
        moments = {"since": options.since, "at": options.at}
        return undelete(setup.store, now=now, keep=setup.keep, dry_run=options.dry_run, **moments)
    if options.command == "copy":
        return setup.copy().copy(
            now=now, dry_run=options.dry_run, accept_changes=options.accept_changes, on_progress=say_progress
        )
    return setup.copy().fetch(
        replace=options.replace,
        dry_run=options.dry_run,
        settle_seconds=options.settle_seconds,
        on_progress=say_progress,
    )


def status(setup: Setup, *, works_only: bool = False) -> dict[str, Any]:
    """Tell how the last works went, and how far behind the copy is. What cannot be read is `{"error": …}`."""
    offsite: dict[str, Any] | None = None
    if setup.offsite is not None and works_only:
        offsite = {"interval_seconds": setup.interval.total_seconds()}
    elif setup.offsite is not None:
        try:
            offsite = {**setup.copy().waiting(), "is_versioned": setup.offsite.is_versioned()}
        except CustodianError as exc:
            offsite = {"error": exc.message}
    return {"offsite": offsite, "purge": last_work("purge"), "copy": last_work("copy")}


def last_work(command: str) -> dict[str, Any] | None:
    """Read how the last work of a kind went since this container started; `None` where there was none."""
    try:
        found: dict[str, Any] = json.loads((WORK / f"{command}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def remember(command: str, outcome: dict[str, Any]) -> None:
    """Keep how a work went; what was last good stays known."""
    before = last_work(command) or {}
    now = datetime.now(UTC).isoformat()
    good = now if "error" not in outcome else before.get("last_good_at")
    incoming = WORK / f".{command}.json"
    incoming.write_text(json.dumps({"ended_at": now, "last_good_at": good, **outcome}), encoding="utf-8")
    incoming.replace(WORK / f"{command}.json")


@contextmanager
def alone(wait_seconds: float = _LOCK_WAIT_SECONDS) -> Iterator[None]:
    """
    Keep every other work out meanwhile; the lock ends with this process, however it ends.

    Raises:
        RefusedError: Another one goes on for too long.
    """
    until = time.monotonic() + wait_seconds
    with (WORK / "lock").open("a", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RefusedError("another work of the custodian is under way", hint="wait for it") from None
                time.sleep(0.2)
        yield


def say(line: dict[str, Any]) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def say_progress(done: int, of: int, size_bytes: int) -> None:
    """Say how far a work is."""
    say({"progress": {"done": done, "of": of, "bytes": size_bytes}})


def main(arguments: list[str] | None = None, *, make_setup: Callable[[], Setup] = read_setup) -> int:
    """Run one command; returns its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    os.umask(0o077)
    try:
        setup = make_setup()
        if options.command == "status":
            outcome: dict[str, Any] = {"result": status(setup, works_only=options.works_only)}
        else:
            with alone():
                outcome = {"result": work(options, setup)}
        code = 0
    except CustodianError as exc:
        outcome, code = {"error": {"message": exc.message, "hint": exc.hint}}, exc.exit_code
    if options.command in ("purge", "copy") and not options.dry_run:
        remember(options.command, outcome)
    say(outcome)
    return code


if __name__ == "__main__":
    sys.exit(main())
