"""
Bring one tool: from PATH, from the cache, from its official release, or by a build.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from toolchain import downloads
from toolchain.builds import GoBuilder, describe_builds
from toolchain.cache import Origin, make_key
from toolchain.engine import EngineStep
from toolchain.engine_client import EngineError
from toolchain.report import ToolchainError
from toolchain.steps import Context, Finding
from toolchain.tools import (
    Choice,
    Found,
    Source,
    Tool,
    choose,
    describe_tools,
    normalize_architecture,
    parse_version,
)


class Workshop:
    """
    What the three tool steps share: descriptions, one probe of the official hosts, one builder.
    """

    def __init__(
        self, context: Context, engine: EngineStep, python: Path, opener: downloads.Opener = downloads.open_url
    ) -> None:
        self.context = context
        self.builder = GoBuilder(context, python)
        self._engine = engine
        self._opener = opener
        self._reachability: downloads.Reachability | None = None
        self._engine_architecture: str | None = None

    @property
    def engine_architecture(self) -> str:
        """Architecture of the engine; this machine's as long as no engine answers."""
        if self._engine_architecture is None:
            try:
                reported = self._engine.client.read_version().architecture
            except EngineError:
                return self.context.host_architecture
            self._engine_architecture = normalize_architecture(reported) or reported
        return self._engine_architecture

    def describe(self, name: str) -> Tool:
        """Return one tool's description for this machine and engine."""
        return describe_tools(self.context.pins, self.context.host_architecture, self.engine_architecture)[name]

    def reach(self) -> downloads.Reachability:
        """Ask all official hosts, once."""
        if self._reachability is None:
            tools = describe_tools(self.context.pins, self.context.host_architecture, self.engine_architecture)
            self._reachability = downloads.probe(tools.values(), self._opener)
        return self._reachability

    def fetch(self, tool: Tool, target: Path) -> str:
        """Take the official release."""
        checksums = self.reach().checksums[tool.name]
        return downloads.fetch_release(tool, checksums, self.context.cache.work, target, self._opener)


class ToolStep:
    """
    One tool that lies in the cache, unless a good one is on PATH.
    """

    def __init__(self, workshop: Workshop, name: str) -> None:
        self.name = name
        self.workshop = workshop
        self.context = workshop.context

    @property
    def tool(self) -> Tool:
        """The description of what is wanted."""
        return self.workshop.describe(self.name)

    @property
    def architecture(self) -> str:
        """What the tool runs on."""
        return self.context.host_architecture

    @property
    def key(self) -> str:
        """The name of the tool's cache entry."""
        recipe = repr(describe_builds(self.context.pins)[self.name])
        return make_key(self.name, self.tool.version, self.architecture, recipe, *self._ingredients())

    def _ingredients(self) -> Iterable[str]:
        return ()

    @property
    def bin(self) -> Path:
        """The folder that holds, or will hold, the tool's programs."""
        return self.context.cache.entry(self.key) / "bin"

    @functools.cached_property
    def _found(self) -> Found | None:
        # Asking a program for its version costs more than all the rest of a set-up that has nothing to do.
        return self.find()

    def find(self) -> Found | None:
        """
        Return the tool as the user has it on PATH.

        What lies in the cache, linked into some environment that is active, is not the user's.
        """
        active = self.context.machine.environment.get("VIRTUAL_ENV", "")
        environments = [Path(folder) / "bin" for folder in (self.context.checkout / ".venv", active) if folder]
        for path in self.context.machine.find_programs(self.tool.program):
            is_cached = path.resolve().is_relative_to(self.context.cache.entries.resolve())
            if not is_cached and path.parent not in environments:
                return self._look_at(path)
        return None

    def _look_at(self, path: Path) -> Found:
        version = parse_version(self.context.machine.read_output([str(path), *self._version_arguments()]) or "")
        folder = path.resolve().parent
        missing = [
            name for name in self.tool.companions if not any((at / name).exists() for at in {folder, path.parent})
        ]
        return Found(path, version, tuple(missing))

    def _version_arguments(self) -> tuple[str, ...]:
        return ("version",)

    def choose(self, *, probe: bool) -> Choice:
        """
        Decide where it comes from.

        Args:
            probe: Whether the network may be asked; otherwise an official release counts as possible.
        """
        # Something may have tidied the cache up, and left the rest of an entry.
        is_whole = (self.bin / self.tool.program).is_file()
        cached = self.context.cache.read_origin(self.key) if is_whole else None
        choice = choose(self.tool, self._found, cached, None)
        if choice.source is Source.OFFICIAL and probe:
            refusal = self.workshop.reach().refusals.get(self.name)
            choice = choose(self.tool, self._found, cached, refusal)
        return choice

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        choice = self.choose(probe=False)
        if choice.source is Source.PATH:
            return Finding(self.name, True, choice.version, choice.source.value, choice.reason, str(choice.path))
        if choice.source is Source.CACHE:
            path = str(self.bin / self.tool.program)
            return Finding(self.name, True, choice.version, choice.origin, choice.reason, path)
        return Finding(self.name, False, self.tool.version, "missing", choice.reason)

    def plan(self) -> str:
        """Say what `provide` would do."""
        choice = self.choose(probe=True)
        return f"{choice.source.value}: {choice.reason}"

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        return

    def provide(self) -> None:
        """Bring it about."""
        choice = self.choose(probe=True)
        if choice.source in (Source.PATH, Source.CACHE):
            return  # another clone was faster
        self.context.reporter.taken(self.name, choice.version, choice.source.value, choice.reason)
        if choice.source is Source.OFFICIAL:
            try:
                self._publish(choice)
                return
            except ToolchainError as failure:
                self.context.reporter.line(f"warning: {failure.message}")
                choice = replace(choice, source=Source.REGISTRY, reason=f"{choice.reason}; the download failed")
                self.context.reporter.taken(self.name, choice.version, choice.source.value, choice.reason)
        self._publish(choice)

    def _publish(self, choice: Choice) -> None:
        begin = time.monotonic()

        def fill(target: Path) -> None:
            if choice.source is Source.OFFICIAL:
                self.workshop.fetch(self.tool, target)
                return
            for build in describe_builds(self.context.pins)[self.name]:
                self.workshop.builder.build(build, target, self.architecture)

        origin = Origin(self.tool.version, choice.source.value, choice.reason)
        self.context.cache.publish(self.key, origin, fill)
        self.context.reporter.working(f"`{self.name}` took {time.monotonic() - begin:.0f} s")
