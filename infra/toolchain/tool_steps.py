"""
The tools themselves: Pulumi with its Python language host, its Docker plugin, and the S3 gateway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from toolchain.cache import hash_folder
from toolchain.provisioning import ToolStep, Workshop
from toolchain.steps import Finding
from toolchain.tools import Found, Source


class PulumiStep(ToolStep):
    """
    The `pulumi` command with its Python language host.
    """

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop, "pulumi")

    def programs(self) -> dict[str, Path]:
        """Return what is linked into the environment, empty where the user's own Pulumi is used."""
        if self.choose(probe=False).source is Source.PATH or not self.bin.is_dir():
            return {}
        return {path.name: path for path in self.bin.iterdir() if _is_for_python(path.name)}

    def find_command(self) -> Path:
        """Return the `pulumi` to run."""
        choice = self.choose(probe=False)
        return choice.path if choice.path is not None else self.bin / "pulumi"


def _is_for_python(name: str) -> bool:
    # The official archive has language hosts for a dozen languages; each on PATH would only be in the way.
    return name == "pulumi" or name.startswith(("pulumi-language-python", "pulumi-python", "pulumi-resource-pulumi-"))


class GatewayStep(ToolStep):
    """
    The S3 gateway that goes into the image of the backup store: a static program for the engine's architecture.
    """

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop, "versitygw")

    @property
    def architecture(self) -> str:
        """The engine's: it runs in a container."""
        return self.workshop.engine_architecture

    def _version_arguments(self) -> tuple[str, ...]:
        return ("--version",)

    def _look_at(self, path: Path) -> Found:
        found = super()._look_at(path)
        if self.architecture != self.context.host_architecture:
            return replace(found, refusal=f"`{path}` is not for the engine's {self.architecture}")
        # A dynamic program names its loader near its beginning, and would not start in the image.
        with path.open("rb") as stream:
            is_dynamic = b"/ld-" in stream.read(4096)
        return replace(found, refusal=f"`{path}` is not a static program") if is_dynamic else found

    def programs(self) -> dict[str, Path]:
        """Return the link by which the image build finds it."""
        choice = self.choose(probe=False)
        path = choice.path if choice.path is not None else self.bin / "versitygw"
        return {"versitygw": path} if path.exists() else {}


class PluginStep(ToolStep):
    """
    Pulumi's Docker plugin, installed into a PULUMI_HOME.

    The official plugin goes into the user's own home where the user's own Pulumi is used. A build of ours never does:
    it would pass for the official one in other projects. It gets a home of its own, keyed like its cache entry.
    """

    def __init__(self, workshop: Workshop, pulumi: PulumiStep) -> None:
        super().__init__(workshop, "pulumi-docker")
        self._pulumi = pulumi

    def _ingredients(self) -> Iterable[str]:
        return (hash_folder(self.context.checkout / "infra" / "toolchain" / "bridge"),)

    @property
    def _plugin(self) -> str:
        return f"resource-docker-v{self.tool.version}"

    @property
    def _users_home(self) -> Path:
        environment = self.context.machine.environment
        own = self.context.cache.root / "pulumi-home"
        configured = environment.get("PULUMI_HOME", "")
        # In an active environment the variable is ours, not the user's.
        if configured and not Path(configured).is_relative_to(own):
            return Path(configured)
        return Path(environment.get("HOME") or Path.home()) / ".pulumi"

    @property
    def _own_home(self) -> Path:
        return self.context.cache.root / "pulumi-home" / self.key

    def home(self) -> Path | None:
        """Return the PULUMI_HOME to export, None for the user's own."""
        return None if self._find_in_users_home() is not None else self._own_home

    def _find_in_users_home(self) -> Path | None:
        if self._pulumi.choose(probe=False).source is not Source.PATH:
            return None
        path = self._users_home / "plugins" / self._plugin / self.tool.program
        return path if _is_installed(path) else None

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        theirs = self._find_in_users_home()
        if theirs is not None:
            reason = "the user's own Pulumi has it"
            return Finding(self.name, True, self.tool.version, "installed plugin", reason, str(theirs))
        path = self._own_home / "plugins" / self._plugin / self.tool.program
        found = super().inspect()
        if found.present and not _is_installed(path):
            return replace(found, present=False, source="missing", reason="cached, not installed as a plugin")
        return replace(found, path=str(path)) if found.present else found

    def find(self) -> Found | None:
        """Find nothing on PATH."""
        return None  # a plugin on PATH makes every run of Pulumi warn, so none is looked for there

    def provide(self) -> None:
        """Bring it about."""
        super().provide()
        origin = self.context.cache.read_origin(self.key)
        is_official = origin is not None and origin.source == Source.OFFICIAL.value
        users = self._pulumi.choose(probe=False).source is Source.PATH and is_official
        home = self._users_home if users else self._own_home
        command = [str(self._pulumi.find_command()), "plugin", "install", "resource", "docker", self.tool.version]
        home.mkdir(parents=True, exist_ok=True)
        self.context.machine.run(
            [*command, "--reinstall", "--file", str(self.bin / self.tool.program)],
            purpose=f"install the Docker plugin into `{home}`",
            log=self.context.cache.log("pulumi-docker"),
            environment={
                **self.context.machine.environment,
                "PULUMI_HOME": str(home),
                "PULUMI_SKIP_UPDATE_CHECK": "true",
            },
        )


def _is_installed(path: Path) -> bool:
    # Pulumi leaves this mark while it unpacks.
    return path.is_file() and not path.parent.with_name(path.parent.name + ".partial").exists()
