"""The stack's program, run whole under Pulumi's mocks: what every container must be, whichever is added next."""

from __future__ import annotations

import asyncio
import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pulumi
import pulumi_docker  # noqa: F401 - registers the resource types before the mocks are set
import pytest
from pulumi.runtime import mocks
from pulumi.runtime import settings as runtime_settings
from pulumi.runtime.stack import run_pulumi_func

from memharbor.errors import ConfigError
from memharbor.server_files.postgres import ServerFile
from memharbor.settings import Settings, load_settings
from memharbor.stack import StackOutputs
from memharbor.stack.config import OFFSITE_KEYS, SECRETS_KEY
from memharbor.stack.secrets import StackSecrets, certificate_nodes, complete_secrets
from memharbor_infra import program
from memharbor_infra.config import read_configuration
from memharbor_infra.contexts import BuildContext, source_context, store_context
from memharbor_infra.files import files_hash

ROOT = Path(__file__).resolve().parents[2]
SECRETS = complete_secrets("unit", certificate_nodes(Settings()))
CONTAINER, VOLUME, IMAGE = (
    "docker:index/container:Container",
    "docker:index/volume:Volume",
    "docker:index/remoteImage:RemoteImage",
)


@dataclass
class Resource:
    """One resource as it was registered."""

    type: str
    name: str
    inputs: dict[str, Any]
    request: Any


@dataclass
class Deployment:
    """Everything that one run of the program registered and exported."""

    resources: list[Resource] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    secret_outputs: set[str] = field(default_factory=set)

    def of_type(self, kind: str) -> dict[str, Resource]:
        return {resource.name: resource for resource in self.resources if resource.type == kind}

    @property
    def containers(self) -> dict[str, Resource]:
        return self.of_type(CONTAINER)

    @property
    def services(self) -> dict[str, Resource]:
        return {name: found for name, found in self.containers.items() if not is_carrier(found)}

    @property
    def carriers(self) -> dict[str, Resource]:
        return {name: found for name, found in self.containers.items() if is_carrier(found)}


def is_carrier(container: Resource) -> bool:
    """Whether the container is never started: it only brings files into a volume."""
    return container.inputs.get("start") is False


class Recorder(mocks.Mocks):
    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        outputs = dict(args.inputs)
        if args.typ == IMAGE:
            outputs["imageId"] = f"sha256:{args.name}"
        return f"{args.name}-id", outputs

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[str, Any], None]:
        raise AssertionError(f"the program looks something up while it runs: {args.token}")


class Monitor(mocks.MockMonitor):
    def __init__(self, deployment: Deployment) -> None:
        super().__init__(Recorder())
        self.deployment = deployment

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802 - the name of the protocol
        from google.protobuf import json_format

        inputs = unwrap(json_format.MessageToDict(request.object))
        self.deployment.resources.append(Resource(request.type, request.name, inputs, request))
        return super().RegisterResource(request)


SECRET_SIGNATURE = "4dabf18193072939515e22adb298388d"  # pragma: allowlist secret - Pulumi's marker, not a secret


@dataclass(frozen=True)
class Secret:
    """A value that Pulumi was told to encrypt."""

    value: Any


def unwrap(value: Any) -> Any:
    if isinstance(value, dict):
        if SECRET_SIGNATURE in value:
            return Secret(unwrap(value["value"]))
        return {key: unwrap(entry) for key, entry in value.items()}
    return [unwrap(entry) for entry in value] if isinstance(value, list) else value


def config_of(stack_secrets: StackSecrets = SECRETS, **values: str) -> dict[str, str]:
    return {f"memharbor:{name}": value for name, value in values.items()} | {
        SECRETS_KEY: stack_secrets.model_dump_json(),
        "docker:host": "unix:///var/run/docker.sock",
    }


def run(body: Callable[[], None], stack: str = "unit") -> Deployment:
    deployment = Deployment()
    runtime_settings.set_root_resource(None)  # type: ignore[arg-type]
    with own_event_loops() as loop:

        async def main() -> None:
            mocks.set_mocks(Recorder(), project="memharbor", stack=stack, monitor=Monitor(deployment))
            body()
            root = runtime_settings.get_root_resource()
            for name, value in root.outputs.items():
                output = pulumi.Output.from_input(value)
                deployment.outputs[name] = await output.future()
                if await output.is_secret():
                    deployment.secret_outputs.add(name)

        loop.run_until_complete(run_pulumi_func(main))
    return deployment


@contextmanager
def own_event_loops() -> Iterator[asyncio.AbstractEventLoop]:
    """Close every event loop that is opened meanwhile: Pulumi's mocks open one per thread and leave it open."""
    opened: list[asyncio.AbstractEventLoop] = []
    create = asyncio.new_event_loop

    def recording() -> asyncio.AbstractEventLoop:
        opened.append(create())
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", recording)
        loop = recording()
        asyncio.set_event_loop(loop)
        try:
            yield loop
        finally:
            asyncio.set_event_loop(None)
            for each in opened:
                each.close()


def deploy(stack: str = "unit", **values: str) -> Deployment:
    configuration = read_configuration(stack, config_of(**values))
    contexts = [
        source_context(name, configuration.settings.base_image)
        for name in ("postgres", "pgbouncer", "backup-store", "custodian")
    ]
    return run(lambda: program.compose(configuration, {context.name: context for context in contexts}), stack)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return deploy()


# What every container must be, and who need not; a new container has to meet all of it.
CARRIERS = "it is never started, and the provider cannot upload into it otherwise"
POLICY: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
    "gains no privileges": (lambda it: "no-new-privileges" in it["securityOpts"], ""),
    "has no capabilities": (lambda it: it["capabilities"]["drops"] == ["ALL"] and "adds" not in it["capabilities"], ""),
    "is not privileged": (lambda it: not it.get("privileged"), ""),
    "has a memory limit, swap included": (lambda it: it["memory"] > 0 and it["memorySwap"] == it["memory"], ""),
    "keeps a bounded log": (lambda it: it["logDriver"] == "json-file" and "max-size" in it["logOpts"], ""),
    "mounts volumes only, nothing of the host": (
        lambda it: "mounts" not in it and all("volumeName" in v and "hostPath" not in v for v in it.get("volumes", [])),
        "",
    ),
    "shares no namespace of the host": (
        lambda it: (
            not {"pidMode", "ipcMode", "usernsMode", "cgroupnsMode"} & set(it) and it.get("networkMode") != "host"
        ),
        "",
    ),
    "publishes ports on loopback only": (lambda it: all(p["ip"] == "127.0.0.1" for p in it.get("ports", [])), ""),
    "takes no secret from the environment": (
        lambda it: not any(word in env.lower() for env in it.get("envs", []) for word in ("password", "secret", "key")),
        "",
    ),
    "names its image by ID": (lambda it: it["image"].startswith("sha256:"), ""),
    "says whose it is": (
        lambda it: {entry["label"] for entry in it["labels"]} == {"memharbor.stack", "memharbor.service"},
        "",
    ),
    "is named after its stack": (lambda it: it["name"].startswith("unit-"), ""),
    "runs as a user by number": (lambda it: it["user"].split(":")[0].isdigit() and it["user"][:2] != "0:", CARRIERS),
    "cannot write its root": (lambda it: it["readOnly"] is True, CARRIERS),
    "is watched and waited for": (lambda it: it["healthcheck"]["tests"][0] == "CMD" and it["wait"] is True, CARRIERS),
    "comes back with the engine": (lambda it: it["restart"] == "unless-stopped", CARRIERS),
    "reaps its children": (lambda it: it["init"] is True, CARRIERS),
    "is stopped and not killed": (lambda it: it["destroyGraceSeconds"] == it["stopTimeout"] > 0, CARRIERS),
}


@pytest.mark.parametrize("rule", POLICY)
def test_every_container(deployment: Deployment, rule: str) -> None:
    holds, exempts_carriers_because = POLICY[rule]
    containers = deployment.services if exempts_carriers_because else deployment.containers
    assert len(containers) >= 4
    for name, container in containers.items():
        assert holds(container.inputs), f"{name}: {rule}"


def test_a_container_without_the_policy_would_be_found() -> None:
    bare = {"name": "x", "image": "debian", "labels": [], "securityOpts": [], "capabilities": {"drops": []}}
    bare |= {"memory": 0, "memorySwap": 0, "logDriver": "none", "logOpts": {}, "volumes": [{"hostPath": "/etc"}]}
    bare |= {"ports": [{"ip": "0.0.0.0"}], "envs": ["PASSWORD=x"], "privileged": True, "pidMode": "host"}
    bare |= {"user": "0:0", "readOnly": False, "healthcheck": {"tests": ["NONE"]}, "wait": False, "restart": "no"}
    bare |= {"init": False, "destroyGraceSeconds": 0, "stopTimeout": 10}
    assert [rule for rule, (holds, _) in POLICY.items() if holds(bare)] == []


def test_files_arrive_in_containers_that_never_run(deployment: Deployment) -> None:
    assert set(deployment.carriers) == {f"{name}-files-carrier" for name in deployment.services}
    for carrier in deployment.carriers.values():
        assert carrier.inputs["networkMode"] == "none"
        assert carrier.inputs["mustRun"] is False
        assert "user" not in carrier.inputs
        assert carrier.inputs["image"] == "sha256:base-image"
        for upload in carrier.inputs["uploads"]:
            assert upload["file"].startswith("/files/")
            assert upload["permissions"] == ("0400" if isinstance(upload["content"], Secret) else "0444")


def test_services_see_their_files_read_only(deployment: Deployment) -> None:
    for name, service in deployment.services.items():
        (mount,) = [volume for volume in service.inputs["volumes"] if volume["containerPath"] == "/etc/memharbor"]
        assert mount["readOnly"] is True
        carrier = deployment.carriers[f"{name}-files-carrier"]
        assert mount["volumeName"] == carrier.inputs["volumes"][0]["volumeName"]


def test_no_secret_is_registered_in_clear(deployment: Deployment) -> None:
    clear = json.dumps([resource.inputs for resource in deployment.resources], default=lambda _: "[secret]")
    values = [
        *SECRETS.passwords.values(),
        *SECRETS.store_secrets.values(),
        SECRETS.repository_passphrase,
        *(pair.key.splitlines()[1] for pair in SECRETS.certificates.values()),
        SECRETS.authority.key.splitlines()[1],
    ]
    assert len(values) > 12
    assert [value[:4] for value in values if value in clear] == []
    uploaded = json.dumps([found.inputs for found in deployment.carriers.values()], default=lambda secret: secret.value)
    assert SECRETS.passwords["pooler"] in uploaded, "the check looks at the wrong place"
    assert SECRETS.authority.key.splitlines()[1] not in uploaded, "the CA's key must not leave the stack's config"


def test_data_volumes_are_protected_kept_and_named(deployment: Deployment) -> None:
    volumes = deployment.of_type(VOLUME)
    data = {name: found for name, found in volumes.items() if name.endswith("-data")}
    assert {found.inputs["name"] for found in data.values()} == {"unit-postgres-0", "unit-backup-store-0"}
    for found in data.values():
        assert found.request.protect
        assert found.request.retainOnDelete
    written = {
        volume["volumeName"]
        for container in deployment.containers.values()
        for volume in container.inputs["volumes"]
        if not volume.get("readOnly") and not is_carrier(container)
    }
    assert written == {found.inputs["name"] for found in data.values()}, "a volume that is written must be protected"


def test_what_owns_a_port_or_a_data_directory_is_deleted_before_it_is_replaced(deployment: Deployment) -> None:
    for name, container in deployment.containers.items():
        assert container.request.deleteBeforeReplace, name


def test_images_are_rebuilt_when_their_context_changes(deployment: Deployment) -> None:
    built = {name: found.inputs for name, found in deployment.of_type(IMAGE).items() if "build" in found.inputs}
    assert set(built) == {"postgres-image", "pgbouncer-image", "backup-store-image", "custodian-image"}
    for inputs in built.values():
        assert inputs["name"].endswith(":" + inputs["triggers"]["context"])
        assert not Path(inputs["build"]["context"]).is_absolute()
        assert inputs["keepLocally"] is True


def test_shared_memory_holds_one_index_build() -> None:
    server = deploy(maintenance_work_mem_mb="400", postgres_memory_mb="4096").containers["postgres-0"].inputs
    assert server["shmSize"] >= 400
    assert server["memory"] == 4096


def test_components_carry_their_types_and_own_their_parts(deployment: Deployment) -> None:
    components = {found.type for found in deployment.resources if found.type.startswith("memharbor:infra:")}
    assert components == {
        f"memharbor:infra:{name}"
        for name in (
            "Images",
            "Network",
            "DataVolumes",
            "BackupStore",
            "Database",
            "Pooler",
            "Custodian",
            "ConfigurationFiles",
        )
    }
    for found in deployment.resources:
        if found.type.startswith("docker:"):
            assert "memharbor:infra:" in found.request.parent, found.name


def test_the_outputs_are_what_the_command_line_reads(deployment: Deployment) -> None:
    outputs = StackOutputs.model_validate(deployment.outputs)
    assert outputs.nodes[0].container == "unit-postgres-0"
    assert outputs.nodes[0].files_volume.startswith("unit-postgres-0-files-")
    assert outputs.containers == {
        "pgbouncer": ("unit-pgbouncer-0",),
        "backup_store": ("unit-backup-store-0",),
        "custodian": ("unit-custodian-0",),
    }
    assert load_settings(("outputs", outputs.settings))[0] == Settings()


OFFSITE = {"offsite_endpoint": "https://copy.example.org", "offsite_bucket": "copies"}
OFFSITE_KEY = {"offsite_access_key": "AKexample", "offsite_secret_key": "hunter2-secret"}  # pragma: allowlist secret


def test_the_custodian_waits_for_the_store_and_has_no_port_and_no_volume_of_its_own(deployment: Deployment) -> None:
    custodian = deployment.services["custodian-0"]
    assert "ports" not in custodian.inputs
    assert [volume["containerPath"] for volume in custodian.inputs["volumes"]] == ["/etc/memharbor"]
    assert any("backup-store" in dependency for dependency in custodian.request.dependencies)


def test_only_the_custodian_gets_the_key_of_the_off_site_copy_and_it_is_encrypted() -> None:
    deployed = deploy(**OFFSITE, **OFFSITE_KEY)
    clear = json.dumps([resource.inputs for resource in deployed.resources], default=lambda _: "[secret]")
    assert "hunter2" not in clear
    assert "hunter2" not in json.dumps(deployed.outputs, default=str)
    who = [
        name
        for name, carrier in deployed.carriers.items()
        if "hunter2" in json.dumps(carrier.inputs, default=lambda secret: secret.value)
    ]
    assert who == ["custodian-0-files-carrier"]


def test_another_off_site_place_replaces_only_the_custodian(deployment: Deployment) -> None:
    before, after = files_volumes(deployment), files_volumes(deploy(**OFFSITE, **OFFSITE_KEY))
    assert {name for name in before if before[name] != after[name]} == {"custodian-0"}


def test_an_off_site_copy_without_its_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="the key of its bucket is not") as caught:
        deploy(**OFFSITE)
    assert caught.value.hints[1] == "run `pulumi config set --secret offsite_secret_key --stack unit`"
    with pytest.raises(ConfigError, match="offsite_bucket"):
        deploy(offsite_endpoint="https://copy.example.org")


def test_a_key_that_stands_in_the_config_in_clear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(**OFFSITE, **OFFSITE_KEY)
    with pytest.raises(ConfigError, match="offsite_access_key stands in the stack's config in clear") as caught:
        program.deploy("unit", config)
    assert "hunter2" not in str(caught.value)
    composed: list[str] = []
    monkeypatch.setattr(program, "build_contexts", lambda base_image: {})
    monkeypatch.setattr(program, "compose", lambda configuration, contexts: composed.append(configuration.stack))
    monkeypatch.setattr(pulumi.runtime, "is_config_secret", lambda key: key in OFFSITE_KEYS)
    program.deploy("unit", config)
    assert composed == ["unit"]


def test_only_the_passwords_are_secret_outputs(deployment: Deployment) -> None:
    assert deployment.secret_outputs == {"passwords"}


def test_a_setting_reaches_its_container() -> None:
    changed = deploy(postgres_port="25001", pool_port="25002", store_memory_mb="256")
    assert changed.containers["postgres-0"].inputs["ports"][0]["external"] == 25001
    assert changed.containers["backup-store-0"].inputs["memory"] == 256
    assert changed.outputs["endpoints"]["rw"] == {"host": "127.0.0.1", "port": 25001, "dbname": "memharbor"}


def test_ports_of_all_addresses_need_certificates_for_the_names_that_clients_use() -> None:
    names = ("db.example.org", "192.0.2.10")
    public = {"bind_address": "0.0.0.0", "public_names": ",".join(names)}
    with pytest.raises(ConfigError, match=r"`postgres-0` is not valid for `192.0.2.10`, `db.example.org`") as caught:
        read_configuration("unit", config_of(**public))
    assert "memharbor stack init --stack unit" in caught.value.hints[0]
    renewed = complete_secrets("unit", certificate_nodes(Settings()), SECRETS, public_names=names)
    changed = run(lambda: program.deploy("unit", config_of(renewed, **public)))
    assert changed.containers["pgbouncer-0"].inputs["ports"][0]["ip"] == "0.0.0.0"
    assert changed.outputs["endpoints"]["rw"]["host"] == "127.0.0.1"


def test_conflicts_with_what_is_there_are_told_with_the_other_problems_and_register_nothing() -> None:
    deployments: list[Deployment] = []
    config = config_of(embedding_dims="0")
    with pytest.raises(ConfigError, match="2 wrong settings") as caught:
        deployments.append(run(lambda: program.deploy("unit", config, ["pool_port: 6432 is in use"])))
    assert deployments == []
    assert "pool_port: 6432 is in use" in caught.value.message


def test_the_pooler_may_open_a_file_for_every_connection() -> None:
    pooler = deploy(pool_max_clients="5000").containers["pgbouncer-0"].inputs
    assert pooler["ulimits"][0]["hard"] > 5000 + Settings().max_connections


def test_another_setting_replaces_only_what_reads_it(deployment: Deployment) -> None:
    changed = deploy(pool_size="21")
    before, after = files_volumes(deployment), files_volumes(changed)
    assert {name for name in before if before[name] != after[name]} == {"pgbouncer-0"}


def files_volumes(deployment: Deployment) -> dict[str, str]:
    return {name: service.inputs["volumes"][-1]["volumeName"] for name, service in deployment.services.items()}


def test_a_wrong_config_names_all_problems_and_registers_nothing() -> None:
    deployments: list[Deployment] = []
    with pytest.raises(ConfigError) as caught:
        deployments.append(
            run(lambda: program.deploy("unit", config_of(embedding_dims="0", pool_port="x", no_such_setting="1")))
        )
    assert deployments == []
    for name in ("embedding_dims", "pool_port", "no_such_setting"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("stack", "config", "said"),
    [
        ("unit", {}, "no secrets"),
        ("Unit", config_of(), "cannot be a stack's name"),
        ("unit", {SECRETS_KEY: '{"passwords": {"app": "hunter2"}}'}, "authority"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_without_quoting_it(
    stack: str, config: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_configuration(stack, config)
    assert "hunter2" not in str(caught.value)
    assert caught.value.hints


def test_the_entry_point_turns_errors_into_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # It asks for the outputs of the stack: no state of the caller's is to be read.
    monkeypatch.setenv("PULUMI_BACKEND_URL", f"file://{tmp_path}")
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps({"memharbor:pool_port": "1"}))
    with pytest.raises(pulumi.RunError, match="pool_port"):
        runpy.run_path(str(ROOT / "infra" / "__main__.py"), run_name="__main__")


def test_the_entry_point_is_short() -> None:
    assert len((ROOT / "infra" / "__main__.py").read_text().splitlines()) <= 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM scratch\n")
    (context / "run").write_text("#!/bin/sh\n")
    return context


def test_the_tag_follows_contents_names_modes_and_base(folder: Path) -> None:
    tags = {BuildContext("x", folder, "base:1").tag}
    tags.add(BuildContext("x", folder, "base:2").tag)
    (folder / "run").chmod(0o755)
    tags.add(BuildContext("x", folder, "base:1").tag)
    (folder / "run").rename(folder / "start")
    tags.add(BuildContext("x", folder, "base:1").tag)
    (folder / "start").write_text("#!/bin/bash\n")
    tags.add(BuildContext("x", folder, "base:1").tag)
    assert len(tags) == 5
    (folder / "start").touch()
    assert BuildContext("x", folder, "base:1").tag in tags


def test_the_stores_context_is_assembled_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memharbor_infra import contexts

    source = tmp_path / "docker" / "backup-store"
    source.mkdir(parents=True)
    for name in ("Dockerfile", "entrypoint", "healthcheck"):
        (source / name).write_bytes((ROOT / "docker" / "backup-store" / name).read_bytes())
    monkeypatch.setattr(contexts, "CHECKOUT", tmp_path)
    gateway = tmp_path / "versitygw"
    gateway.write_bytes(b"\x7fELF")
    gateway.chmod(0o755)
    # The digest is that of the folder as it lies there, so it is read before the folder is assembled again.
    context = store_context("base:1", gateway)
    first = context.digest
    (context.folder / "left-over").write_text("x")
    assert context.digest != first
    assert store_context("base:1", gateway).digest == first
    assert sorted(path.name for path in context.folder.iterdir()) == [
        "Dockerfile",
        "entrypoint",
        "healthcheck",
        "versitygw",
    ]
    gateway.write_bytes(b"\x7fELF2")
    assert store_context("base:1", gateway).digest != first


def test_a_missing_gateway_names_the_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memharbor_infra.contexts import find_gateway

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="versitygw") as caught:
        find_gateway([tmp_path])
    assert caught.value.hints == ("run `make setup`",)


def test_the_hash_of_files_follows_content_path_mode_and_owner() -> None:
    files = [ServerFile("a", "1"), ServerFile("b", "2")]
    variants = [
        files,
        [ServerFile("a", "1"), ServerFile("b", "3")],
        [ServerFile("a", "1"), ServerFile("c", "2")],
        [ServerFile("a", "1"), ServerFile("b", "2", is_secret=True)],
    ]
    hashes = {files_hash(variant, "1:1") for variant in variants} | {files_hash(files, "2:2")}
    assert len(hashes) == 5
    assert files_hash(files[::-1], "1:1") in hashes


def test_the_images_make_the_users_that_the_program_runs() -> None:
    from memharbor_infra import mounts

    users = {
        "postgres": mounts.POSTGRES_USER,
        "pgbouncer": mounts.POOLER_USER,
        "backup-store": mounts.STORE_USER,
        "custodian": mounts.CUSTODIAN_USER,
    }
    for name, user in users.items():
        assert f"USER {user}\n" in (ROOT / "docker" / name / "Dockerfile").read_text()
