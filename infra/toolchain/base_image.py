"""
Put the base image of all Memharbor images into the engine.

From the registry if the engine reaches one; otherwise the same Debian release by debootstrap, imported under the same
tag, so that what is tested is what is shipped. `docker/base/README.md` has the differences.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from toolchain import apt
from toolchain.engine import EngineStep, make_scratch_folder
from toolchain.engine_client import EngineError, read_blocks
from toolchain.report import EXIT_REFUSED, ToolchainError
from toolchain.steps import Context, Finding
from toolchain.tools import normalize_architecture

SOURCE_LABEL = "io.memharbor.base-image.source"
_REGISTRY_TIMEOUT_SECONDS = 5
_SCRIPTS = Path("/usr/share/debootstrap/scripts")


def describe_debootstrap(
    *, program: str, release: str, architecture: str, target: Path, mirror: str | None, script: Path | None
) -> list[str]:
    """
    Return the command that unpacks a minimal Debian.

    An empty mirror is debootstrap's own default, which is how the script is reached without naming one.
    """
    command = [program, "--variant=minbase", f"--arch={architecture}", "--include=ca-certificates", "--force-check-gpg"]
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    command += [f"--keyring={keyring}", release, str(target), mirror or ""]
    return [*command, str(script)] if script else command


class BaseImageStep:
    """
    The image that every Dockerfile of the project begins with.
    """

    name = "base image"

    def __init__(self, context: Context, engine: EngineStep) -> None:
        self._context = context
        self._engine = engine
        self._reference = context.pins.BASE_IMAGE
        self._repository, _, self._tag = self._reference.partition(":")
        self._registry_refusal: str | None = None

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        try:
            image = self._engine.client.find_image(self._reference)
        except EngineError as failure:
            return Finding(self.name, False, "", "missing", f"the engine does not answer: {failure}", self._reference)
        if image is None:
            return Finding(self.name, False, "", "missing", "not in the engine", self._reference)
        source = image.labels.get(SOURCE_LABEL, "")
        # A tag cannot be pinned by a digest that this repository has never seen; the one that came is reported.
        reason = source or ", ".join(image.digests) or "in the engine already"
        version = image.id.removeprefix("sha256:")[:12]
        return Finding(self.name, True, version, "debootstrap" if source else "image", reason, self._reference)

    def plan(self) -> str:
        """Say what `provide` would do."""
        refusal = self._ask_registry()
        return f"make it with debootstrap, no registry: {refusal}" if refusal else "pull it from the registry"

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        try:
            self._engine.client.read_version()
        except EngineError:
            return  # the engine is to be installed, which takes root, which is all that debootstrap takes
        self._registry_refusal = self._ask_registry()
        if self._registry_refusal is None or self._context.machine.is_root():
            return
        raise ToolchainError(
            f"cannot get `{self._reference}`: the engine reaches no registry ({self._registry_refusal}), and making"
            " the image with debootstrap takes root; nothing was changed",
            hints=[
                "run `python3 infra/toolchain setup` once as root",
                f"bring it: `docker save {self._reference} | docker load`",
            ],
            exit_code=EXIT_REFUSED,
        )

    def _ask_registry(self) -> str | None:
        """Return why the registry cannot be used, None if it can."""
        try:
            self._engine.client.find_registry_digest(self._reference, _REGISTRY_TIMEOUT_SECONDS)
        except EngineError as failure:
            return str(failure)
        return None

    def provide(self) -> None:
        """Bring it about."""
        report = self._context.reporter
        refusal = self._registry_refusal or self._ask_registry()
        if refusal is None:
            report.taken(self.name, self._reference, "registry", "the engine reaches it")
            try:
                self._engine.client.pull_image(self._repository, self._tag)
                return
            except EngineError as failure:
                refusal = f"the pull broke off: {failure}"
        report.taken(self.name, self._reference, "debootstrap", f"no registry: {refusal}")
        self._bootstrap()

    def _bootstrap(self) -> None:
        self._refuse_foreign_architecture()
        self._install_debootstrap()
        release = self._context.pins.DEBIAN_RELEASE
        log = self._context.cache.log("base-image")
        # An older debootstrap has no script for a newer release; `sid` is the one that they all link to.
        script = None if (_SCRIPTS / release).exists() else _SCRIPTS / "sid"
        with make_scratch_folder() as scratch:
            root = Path(scratch) / "root"
            mirror = apt.find_mirror()
            command = describe_debootstrap(
                program=str(self._context.machine.find_programs("debootstrap")[0]),
                release=release,
                architecture=self._context.host_architecture,
                target=root,
                mirror=mirror,
                script=script,
            )
            where = f"the machine's mirror `{mirror}`" if mirror else "debootstrap's default mirror"
            self._context.reporter.working(f"debootstrap of {release} from {where}")
            self._context.machine.run(
                command,
                purpose=f"make `{self._reference}` with debootstrap from {where}",
                log=log,
                hints=["check that the mirror serves this release"],
            )
            slim_down(root, self._context.checkout / "docker" / "base")
            self._import(root)

    def _refuse_foreign_architecture(self) -> None:
        engine = normalize_architecture(self._engine.client.read_version().architecture)
        if engine != self._context.host_architecture:
            raise ToolchainError(
                f"cannot make `{self._reference}` with debootstrap: this machine is"
                f" {self._context.host_architecture}, the engine is {engine}",
                hints=["let the engine reach a registry, or run the set-up on a machine like the engine's"],
            )

    def _install_debootstrap(self) -> None:
        keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
        if self._context.machine.find_programs("debootstrap") and keyring.exists():
            return
        packages = ["debootstrap", "debian-archive-keyring"]
        apt.install_packages(
            self._context.machine, packages, tool="debootstrap", log=self._context.cache.log("base-image")
        )

    def _import(self, root: Path) -> None:
        changes = ['CMD ["bash"]', f'LABEL {SOURCE_LABEL}="debootstrap of {self._context.pins.DEBIAN_RELEASE}"']
        command = ["tar", "--numeric-owner", "--one-file-system", "-C", str(root), "-c", "."]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603 - all written above
            try:
                self._engine.client.import_image(self._repository, self._tag, read_blocks(process.stdout), changes)
            except EngineError as failure:
                process.kill()
                raise ToolchainError(f"cannot import `{self._reference}` into the engine: {failure}") from failure
        if process.returncode != 0:
            raise ToolchainError(f"cannot pack `{self._reference}`: `tar` ended with status {process.returncode}")


def slim_down(root: Path, recipe: Path) -> None:
    """
    Give an unpacked Debian the shape of the official slim image.

    Args:
        root: The unpacked system.
        recipe: `docker/base`: `rootfs/` is copied over it, `emptied.txt` lists the folders that are emptied.
    """
    for source in sorted(path for path in (recipe / "rootfs").rglob("*") if path.is_file()):
        target = root / source.relative_to(recipe / "rootfs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        # Modes are set, not copied: the checkout has those of its owner's umask.
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
    for line in (recipe / "emptied.txt").read_text(encoding="utf-8").splitlines():
        folder = line.split("#", 1)[0].strip()
        if not folder:
            continue
        for entry in (root / folder.lstrip("/")).glob("*"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
