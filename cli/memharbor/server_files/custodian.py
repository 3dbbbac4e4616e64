"""
Every configuration file of the custodian: its schedule, its two places, its keys.

Pure, like `memharbor.server_files.postgres`. `docker/custodian` reads them.
"""

from __future__ import annotations

import json

from memharbor.server_files.postgres import STORE_BUCKET, STORE_PORT, STORE_REGION, ServerFile, header
from memharbor.settings import Settings
from memharbor.stack.secrets import StackSecrets

_PROGRAM = "/usr/local/lib/memharbor/custodian"
# Once a day, and not at the full hour, when everybody's does.
_PURGE_SCHEDULE = "37 3 * * *"


def render_custodian_crontab(settings: Settings) -> str:
    """Render the schedule: purge every day, and copy where there is an off-site place."""
    lines = [header("#").rstrip(), f"{_PURGE_SCHEDULE} {_PROGRAM} purge"]
    if settings.offsite_endpoint:
        lines.append(f"*/{settings.offsite_interval_minutes} * * * * {_PROGRAM} copy")
    return "\n".join(lines) + "\n"


def render_custodian_config(settings: Settings, stack: str) -> str:
    """Render what is no secret: the promise, and the two places."""
    offsite = {
        "endpoint": settings.offsite_endpoint,
        "region": settings.offsite_region,
        "bucket": settings.offsite_bucket,
        "folder": f"{settings.offsite_folder or stack}/",
        "interval_minutes": settings.offsite_interval_minutes,
    }
    config = {
        "stack": stack,
        "version_retention_days": settings.version_retention_days,
        "store": {
            "endpoint": f"https://backup-store:{STORE_PORT}",
            "region": STORE_REGION,
            "bucket": STORE_BUCKET,
        },
        "offsite": offsite if settings.offsite_endpoint else None,
    }
    return json.dumps(config, indent=1) + "\n"


def custodian_files(
    settings: Settings, stack: str, secrets: StackSecrets, offsite_key: tuple[str, str] | None
) -> tuple[ServerFile, ...]:
    """
    List the files of the custodian.

    Args:
        settings: The stack's settings.
        stack: The stack's name.
        secrets: Its secrets.
        offsite_key: Access key and secret key of the off-site copy's bucket; not passed on where there is no copy.
    """
    keys = {"store": ["custodian", secrets.store_secrets["custodian"]]}
    files = [ServerFile("tls/ca.crt", secrets.authority.certificate)]
    if settings.offsite_endpoint and offsite_key is not None:
        keys["offsite"] = list(offsite_key)
        if settings.offsite_ca_certificate:
            files.append(ServerFile("tls/offsite-ca.crt", settings.offsite_ca_certificate.strip() + "\n"))
    return (
        ServerFile("custodian/crontab", render_custodian_crontab(settings)),
        ServerFile("custodian/config.json", render_custodian_config(settings, stack)),
        ServerFile("secrets/custodian.json", json.dumps(keys) + "\n", is_secret=True),
        *files,
    )
