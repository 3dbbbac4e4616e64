"""`memharbor settings`."""

from __future__ import annotations

import os

import click

from memharbor.commands import common_options, stack_option
from memharbor.output import Output


@click.group()
def settings() -> None:
    """Show every setting with its origin."""


@settings.command()
@stack_option
@common_options
def show(output: Output, stack: str) -> None:
    """
    Show each setting, its value and where that came from: environment, config of the stack, default.

    Of a stack that is up, these are the settings in force; what its config would change is said with them.

    \b
    Example:
      memharbor settings show
    """
    from memharbor.errors import ConfigError
    from memharbor.settings import load_settings, setting_fields, settings_from_environment
    from memharbor.target import explain_origins, find_target

    try:
        target = find_target(stack, os.environ.get("MEMHARBOR_DSN"))
        values, origins = target.settings, explain_origins(target)
    except ConfigError as exc:
        output.detail(exc.message)
        output.note(f"stack {stack} is not up: these are the environment's settings and the defaults")
        values, origins = load_settings(("environment", settings_from_environment(os.environ)))
    rows = [
        {
            "setting": name,
            "value": getattr(values, name),
            "unit": (field.json_schema_extra or {}).get("unit", "")
            if isinstance(field.json_schema_extra, dict)
            else "",
            "origin": origins[name],
            "description": field.description,
        }
        for name, field in setting_fields().items()
    ]
    output.table(rows, ["setting", "value", "unit", "origin"])
