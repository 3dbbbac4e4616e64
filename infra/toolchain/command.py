"""
The edge: parse the command line, put the steps together, run them in order.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from toolchain.activation import ActivationStep
from toolchain.base_image import BaseImageStep
from toolchain.cache import Cache, find_cache_root
from toolchain.engine import EngineStep
from toolchain.environment import EnvironmentStep, ProjectStep
from toolchain.machine import LocalMachine
from toolchain.pins import load_pins
from toolchain.provisioning import Workshop
from toolchain.report import EXIT_CONFIG, Reporter, ToolchainError
from toolchain.steps import Context, Finding, Step
from toolchain.tool_steps import GatewayStep, PluginStep, PulumiStep
from toolchain.tools import normalize_architecture

_EXIT_INTERRUPTED = 130


class Toolchain:
    """
    All steps in the order in which they are provided, what others wait for first.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        engine = EngineStep(context)
        environment = EnvironmentStep(context)
        self._workshop = Workshop(context, engine, environment.python)
        gateway, pulumi = GatewayStep(self._workshop), PulumiStep(self._workshop)
        plugin = PluginStep(self._workshop, pulumi)
        activation = ActivationStep(
            context, environment, lambda: {**pulumi.programs(), **gateway.programs()}, plugin.home
        )
        project = ProjectStep(context, environment)
        base_image = BaseImageStep(context, engine)
        self._tools: list[Step] = [engine, environment, base_image, gateway, pulumi, plugin]
        self._steps: list[Step] = [*self._tools, activation, project]

    def inspect(self) -> list[Finding]:
        """Look at everything, change nothing."""
        return [step.inspect() for step in self._steps]

    def plan(self) -> list[Finding]:
        """Say for everything that is missing what a set-up would do; raise ToolchainError where it would refuse."""
        findings: list[Finding] = []
        for step in self._steps:
            finding = step.inspect()
            if not finding.present:
                step.check_possible()
                finding = replace(finding, reason=f"would {step.plan()}")
            findings.append(finding)
        return findings

    def set_up(self) -> None:
        """Provide what is missing, after everything that can be refused was refused."""
        report = self._context.reporter
        findings = self.inspect()
        if not all(finding.present for finding in findings):
            missing = {finding.name for finding in findings if not finding.present}
            for step in self._steps:
                if step.name in missing:
                    step.check_possible()
            report.line("set-up: " + ", ".join(finding.name for finding in findings if not finding.present))
            with self._context.cache.locked(lambda: report.working("waiting for another set-up on this machine")):
                for step in self._steps:
                    if step not in self._tools:
                        self._workshop.builder.clean()
                    if not step.inspect().present:
                        step.provide()
            findings = self.inspect()
        for finding in findings:
            report.taken(finding.name, finding.version, finding.source, finding.reason)
        report.line(f"set-up is complete ({report.elapsed_seconds():.1f} s)")


def make_context(checkout: Path, reporter: Reporter) -> Context:
    """
    Gather what the steps work with.
    """
    architecture = normalize_architecture(platform.machine())
    if platform.system() != "Linux" or architecture is None:
        raise ToolchainError(
            f"cannot set up on {platform.system()} {platform.machine()}: Linux on x86-64 or arm64 is needed",
            hints=["use a virtual machine with Debian or Ubuntu"],
            exit_code=EXIT_CONFIG,
        )
    machine = LocalMachine(reporter.working)
    cache = Cache(find_cache_root(machine.environment))
    return Context(checkout, load_pins(checkout), machine, cache, reporter, architecture)


def build_parser() -> argparse.ArgumentParser:
    """
    Return the command line of `python3 infra/toolchain`.
    """
    parser = argparse.ArgumentParser(prog="python3 infra/toolchain", description="Get what Memharbor runs on.")
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="install, start, download or build what is missing")
    setup.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    status = commands.add_parser("status", help="show each tool with its version and source, change nothing")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def show_status(findings: Sequence[Finding], *, as_json: bool) -> None:
    """
    Write the findings to stdout: they are the result, not a message.
    """
    if as_json:
        sys.stdout.write(json.dumps({finding.name: asdict(finding) for finding in findings}, indent=2) + "\n")
        return
    for finding in findings:
        sys.stdout.write(f"{finding.name:<18} {finding.version:<14} {finding.source:<20} {finding.path}\n")
        sys.stdout.write(f"{'':<18} {finding.reason}\n")


def main(arguments: Sequence[str]) -> int:
    """
    Run one command; return its exit code.
    """
    options = build_parser().parse_args(arguments)
    reporter = Reporter()
    try:
        toolchain = Toolchain(make_context(Path(__file__).resolve().parents[2], reporter))
        if options.command == "status":
            show_status(toolchain.inspect(), as_json=options.json)
        elif options.dry_run:
            show_status(toolchain.plan(), as_json=False)
        else:
            toolchain.set_up()
    except ToolchainError as failure:
        reporter.error(failure)
        return failure.exit_code
    except OSError as failure:
        # Most often a checkout or a cache that another user, root for one, has set up before.
        hint = f"see who owns it: `ls -ld '{failure.filename}'`" if failure.filename else "run this again"
        reporter.error(ToolchainError(f"cannot go on: {failure}", hints=[hint]))
        return EXIT_CONFIG
    except KeyboardInterrupt:
        reporter.line("interrupted; `python3 infra/toolchain setup` goes on where it stopped")
        return _EXIT_INTERRUPTED
    return 0
