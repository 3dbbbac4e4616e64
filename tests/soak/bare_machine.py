"""
A machine with what the README asks for and nothing else: a container, unpacked from the distribution's own packages, in
which an engine of its own can run.

It gets this machine's registry configuration (certificates, apt, pip, proxies), as whoever set this machine up gave it
to this one, and the working tree as a repository to clone. Whatever is made carries a label with its owner, so that the
next run removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from toolchain import apt

from memharbor import versions

ROOT = Path(__file__).resolve().parents[2]
OWNER_LABEL = "memharbor.soak.owner"
GIVEN = ("ca-certificates", "git", "make", "python3", "python3-venv")
BUNDLE = "/srv/memharbor.bundle"
LONGEST_COMMAND_SECONDS = 3600
REGISTRY_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "GOPROXY", "GOSUMDB", "GONOSUMDB")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy")

# An image build may not mount anything; mmdebstrap, other than debootstrap, can do without.
DOCKERFILE = f"""\
FROM {versions.BASE_IMAGE} AS unpacked
LABEL {OWNER_LABEL}="{os.getpid()}"
RUN apt-get update && apt-get install --yes --no-install-recommends \
    debian-archive-keyring distro-info-data libdistro-info-perl mmdebstrap ubuntu-archive-keyring
ARG RELEASE
ARG COMPONENTS
ARG PACKAGES
ARG MIRROR
RUN mmdebstrap --variant=minbase --keyring=/usr/share/keyrings --aptopt='Acquire::Check-Valid-Until "false"' \
    --components="$COMPONENTS" --include="$PACKAGES" "$RELEASE" /unpacked $MIRROR
FROM scratch
LABEL {OWNER_LABEL}="{os.getpid()}"
COPY --from=unpacked /unpacked /
"""
# What `--privileged` gives, piece by piece: an engine needs no CAP_SYS_RESOURCE, and a sandbox may not have it to give.
# On the one hierarchy of control groups, the first process moves aside, so that groups can be made below its own.
START = """\
awk '$2 ~ "^/(sys|proc)(/|$)" && $4 ~ "^ro" { print $2 }' /proc/mounts | xargs -rn1 mount -o remount,bind,rw
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mkdir -p /sys/fs/cgroup/first
    echo $$ >/sys/fs/cgroup/first/cgroup.procs
    sed 's/ / +/g; s/^/+/' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
fi
"""
COMMIT = f"""\
cd /srv/source && git init --quiet --initial-branch=main && git add --all
git -c user.name=test -c user.email=test@example.org commit --quiet --message='The working tree'
git bundle create --quiet {BUNDLE} HEAD main && rm -r /srv/source
"""


@dataclass(frozen=True)
class Release:
    """
    A distribution's release, and whether systemd manages its services.
    """

    codename: str
    components: str
    with_systemd: bool = False

    def __str__(self) -> str:
        return f"{self.codename}-systemd" if self.with_systemd else self.codename


@dataclass
class Machine:
    """
    One bare machine.

    Args:
        container: What it runs in.
        variables: The registry configuration that this machine has in variables.
    """

    container: Any
    variables: dict[str, str]

    def run(self, command: str, *, user: str = "root", status: int = 0, **variables: str) -> str:
        """Run a line of shell in the user's home as `user`; return its output, or fail if the exit status differs."""
        home = "/root" if user == "root" else f"/home/{user}"
        began_at = time.monotonic()
        done = self.container.exec_run(
            ["bash", "-euc", command], user=user, workdir=home, environment={**self.variables, **variables}
        )
        output: str = done.output.decode("utf-8", "replace")
        sys.stderr.write(f"{user}$ {command.strip().splitlines()[0]}\n{output[-20000:]}")
        sys.stderr.write(f"[status {done.exit_code} after {time.monotonic() - began_at:.0f} s]\n")
        if done.exit_code != status:
            pytest.fail(f"`{command}` exited with {done.exit_code}, not {status}\n{output[-6000:]}")
        return output

    def put(self, folder: str, files: dict[str, bytes]) -> None:
        """Write files into a folder that exists or whose parent does."""
        self.run(f"mkdir -p {folder}")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
        self.container.put_archive(folder, packed.getvalue())

    def put_folder(self, folder: str, source: Path, names: list[str]) -> None:
        """Copy files and folders of this machine, with their modes, to root."""
        self.run(f"mkdir -p {folder}")
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for name in names:
                    archive.add(source / name, name, filter=give_to_root)
            packed.seek(0)
            self.container.put_archive(folder, packed)


def give_to_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """
    Return the member with another owner.
    """
    return member.replace(uid=0, gid=0, uname="root", gname="root", deep=False)


def build_image(client: Any, release: Release) -> str:
    """
    Unpack a release with what is given into an image; return its tag.
    """
    tag = f"memharbor-bare:{release}-{os.getpid()}"
    packages = (*GIVEN, *(("dbus", "systemd-sysv") if release.with_systemd else ()))
    mirror = apt.find_mirror() if release.components == "main" else None
    client.images.build(
        fileobj=io.BytesIO(DOCKERFILE.encode()),
        tag=tag,
        rm=True,
        forcerm=True,
        buildargs={
            "RELEASE": release.codename,
            "COMPONENTS": release.components,
            "PACKAGES": ",".join(packages),
            "MIRROR": mirror or "",
        },
    )
    return tag


@contextlib.contextmanager
def start_machine(client: Any, tag: str, *, with_systemd: bool = False) -> Iterator[Machine]:
    """
    Start a machine and give it this one's registry configuration and a repository; remove it with all that it held.
    """
    name = f"memharbor-bare-{os.getpid()}-{secrets.token_hex(2)}"
    container = None
    try:
        container = client.containers.run(
            tag,
            ["bash", "-euc", START + ("exec /sbin/init" if with_systemd else "exec sleep infinity")],
            name=name,
            labels={OWNER_LABEL: str(os.getpid())},
            detach=True,
            init=not with_systemd,
            environment={"container": "docker"} if with_systemd else {},
            tmpfs={"/run": "", "/run/lock": ""} if with_systemd else {},
            cap_add=["ALL"],
            cap_drop=["SYS_RESOURCE"],
            security_opt=["seccomp=unconfined", "apparmor=unconfined"],
            device_cgroup_rules=["a *:* rwm"],
            # Volumes without names, which go with their container: layers of images cannot lie on layers.
            volumes=["/var/lib/docker", "/var/lib/containerd"],
        )
        every = [*REGISTRY_VARIABLES, *PROXY_VARIABLES, *(name.upper() for name in PROXY_VARIABLES)]
        machine = Machine(container, {name: os.environ[name] for name in every if os.environ.get(name)})
        if with_systemd:
            # Its start empties /tmp.
            machine.run("until systemctl is-system-running --wait | grep -qE 'running|degraded'; do sleep 0.2; done")
        give_registries(machine)
        give_repository(machine)
        yield machine
    finally:
        if container is not None:
            container.remove(force=True, v=True)


def give_registries(machine: Machine) -> None:
    """
    Copy how this machine reaches its package registries.
    """
    certificates = Path("/usr/local/share/ca-certificates")
    machine.put(str(certificates), {path.name: path.read_bytes() for path in sorted(certificates.glob("*.crt"))})
    machine.run("update-ca-certificates")
    for path in (Path("/etc/pip.conf"), Path.home() / ".config" / "pip" / "pip.conf"):
        if path.is_file():
            machine.put("/etc", {"pip.conf": path.read_bytes()})
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    prefixes = ("Acquire::Check-", "Acquire::http", "Acquire::Retries", "Acquire::ForceIP")
    kept = [line for line in dump.splitlines() if line.startswith(prefixes)]
    machine.put("/etc/apt/apt.conf.d", {"99machine": "\n".join([*kept, ""]).encode()})


def give_repository(machine: Machine) -> None:
    """
    Put the working tree, also what is not committed yet, there as a file that `git clone` takes.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    names = sorted({name for name in listed if name and (ROOT / name).exists()})
    machine.put_folder("/srv/source", ROOT, names)
    machine.run(COMMIT)


def remove_leftovers(client: Any) -> None:
    """
    Remove machines and images of this process, and of others that are gone.
    """

    def is_left(labels: dict[str, str] | None) -> bool:
        owner = (labels or {}).get(OWNER_LABEL, "")
        return owner == str(os.getpid()) or (owner.isdigit() and not Path(f"/proc/{owner}").exists())

    for container in client.containers.list(all=True, filters={"label": OWNER_LABEL}):
        if is_left(container.labels):
            container.remove(force=True, v=True)
    # Without their tags first: an image that others are made from cannot go before them.
    for image in client.images.list(all=True, filters={"label": OWNER_LABEL}):
        if is_left(image.labels):
            with contextlib.suppress(docker.errors.APIError):
                client.images.remove(image.id, force=True)
