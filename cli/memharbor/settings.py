"""
Every setting of Memharbor: type, unit, default, description, example, once.

Read by the stack's program (as Pulumi config), by the SQL templates, by the Ansible roles and by the CLI; their
documentation, argument specifications and outputs are checked against this module (`tests/unit/test_contracts.py`).
This module reads no file and runs no tool: what it is given is what it judges.

Precedence: option, then `MEMHARBOR_*`, then stack outputs, then default.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from memharbor import versions
from memharbor.cron import parse_cron
from memharbor.errors import ConfigError

ENVIRONMENT_PREFIX = "MEMHARBOR_"

# Above these dimensions a row with a PLAIN embedding no longer fits a page. Source: schema-proof, finding 8
# (docs/concepts/schema.md); HNSW limits are 2,000 for vector and 4,000 for halfvec (pgvector README, HNSW).
VECTOR_PLAIN_DIMS_MAX = 1900
HALFVEC_PLAIN_DIMS_MAX = 3800
EMBEDDING_DIMS_MAX = 4000
# What the pools leave of max_connections to administration, replication, backup and roll-outs.
RESERVED_CONNECTIONS = 10

_OPERATOR_SUFFIX = {"cosine": "cosine_ops", "l2": "l2_ops", "inner_product": "ip_ops"}
_OPERATOR = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}
# One part of a host name. Source: RFC 1123, 2.1.
_HOST_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}")

Identifier = Annotated[str, Field(pattern=rf"^{_IDENTIFIER.pattern}$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Megabytes = Annotated[int, Field(ge=16, le=4_194_304)]


def _check_schedule(value: str) -> str:
    if value.strip():
        parse_cron(value)
    return " ".join(value.split())


Schedule = Annotated[str, AfterValidator(_check_schedule)]


def _spell_host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text.lower()


def _is_host(name: str) -> bool:
    try:
        return not ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return len(name) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in name.split("."))


def _setting(default: Any, description: str, *, example: Any, unit: str = "") -> Any:
    return Field(default=default, description=description, examples=[example], json_schema_extra={"unit": unit})


class Settings(BaseModel):
    """
    Hold one complete, valid configuration.

    Frozen; unknown keys are errors. Build one with `load_settings`, which reports all problems at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    topology: Literal["single"] = _setting(
        "single", "How many database nodes there are and who leads.", example="single"
    )
    database: Identifier = _setting("memharbor", "Name of the database that holds the memories.", example="memharbor")

    embedding_dims: Annotated[int, Field(ge=1, le=EMBEDDING_DIMS_MAX)] = _setting(
        1536, "Dimensions of every embedding; the same number as in Mem0's `embedding_model_dims`.", example=384
    )
    embedding_distance: Literal["cosine", "l2", "inner_product"] = _setting(
        "cosine", "Distance that the vector indexes serve; Mem0 always asks for cosine.", example="cosine"
    )

    bind_address: Literal["127.0.0.1", "0.0.0.0", "::1", "::"] = _setting(  # noqa: S104 - the choice is the user's
        "127.0.0.1", "Address of the host on which ports are published.", example="127.0.0.1"
    )
    public_names: str = _setting(
        "",
        "Names and addresses under which clients elsewhere reach the published ports, by commas; the certificates of"
        " PostgreSQL and PgBouncer are valid for them. Needed where `bind_address` is not loopback.",
        example="db.example.org,192.0.2.10",
    )
    postgres_port: Port = _setting(15432, "Port of the host that leads straight to PostgreSQL.", example=15432)
    pool_port: Port = _setting(6432, "Port of the host that leads to PgBouncer.", example=6432)

    postgres_memory_mb: Megabytes = _setting(
        2048, "Memory limit of each PostgreSQL container.", example=4096, unit="MiB"
    )
    maintenance_work_mem_mb: Megabytes = _setting(
        256, "Memory for one index build or vacuum; also sizes the container's shared memory.", example=512, unit="MiB"
    )
    pool_memory_mb: Megabytes = _setting(128, "Memory limit of the PgBouncer container.", example=128, unit="MiB")
    store_memory_mb: Megabytes = _setting(512, "Memory limit of the backup store's container.", example=512, unit="MiB")
    custodian_memory_mb: Annotated[int, Field(ge=192, le=4_194_304)] = _setting(
        256, "Memory limit of the custodian's container.", example=256, unit="MiB"
    )
    max_connections: Annotated[int, Field(ge=20, le=2000)] = _setting(
        100, "Connections that PostgreSQL accepts, pools and administration together.", example=200, unit="connections"
    )

    pool_size: Annotated[int, Field(ge=1, le=1000)] = _setting(
        20, "Server connections of the transaction pool, per role.", example=20, unit="connections"
    )
    pool_session_size: Annotated[int, Field(ge=1, le=1000)] = _setting(
        10, "Server connections of the session pool, per role, for long work.", example=10, unit="connections"
    )
    pool_max_clients: Annotated[int, Field(ge=10, le=100_000)] = _setting(
        500, "Client connections that PgBouncer accepts.", example=1000, unit="connections"
    )

    backup_schedule_full: Schedule = _setting(
        "17 2 * * 0", "When a full backup is made, as a cron expression in UTC; empty is never.", example="17 2 * * 0"
    )
    backup_schedule_diff: Schedule = _setting(
        "17 2 * * 1-6",
        "When a backup of what changed since the last full one is made, as a cron expression in UTC; empty is never.",
        example="17 2 * * 1-6",
    )
    backup_schedule_incr: Schedule = _setting(
        "47 * * * *",
        "When a backup of what changed since the last one is made, as a cron expression in UTC; empty is never.",
        example="47 */6 * * *",
    )
    backup_retention_full: Annotated[int, Field(ge=1, le=9999)] = _setting(
        2,
        "Full backups that are kept at least; what depends on an older one goes with it.",
        example=4,
        unit="backups",
    )
    backup_retention_days: Annotated[int, Field(ge=0, le=36_500)] = _setting(
        0,
        "Days back to which every moment can be restored, as far as there are backups of them; 0 is by"
        " `backup_retention_full` only.",
        example=30,
        unit="days",
    )
    archive_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = _setting(
        60, "Longest time that a written row stays out of the archive.", example=60, unit="seconds"
    )
    version_retention_days: Annotated[int, Field(ge=1, le=3650)] = _setting(
        30,
        "How long what is deleted or overwritten in the backup store can be brought back; then it is purged.",
        example=30,
        unit="days",
    )

    offsite_endpoint: Annotated[str, Field(pattern=r"^(https://[A-Za-z0-9.\[\]:-]+)?$")] = _setting(
        "",
        "URL of the S3 service that holds the off-site copy of the backups; empty is none.",
        example="https://s3.eu-central-1.example.org",
    )
    offsite_bucket: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])?$")] = _setting(
        "", "Bucket of the off-site copy; it must exist.", example="example-memories-copy"
    )
    offsite_region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")] = _setting(
        "us-east-1", "Region of the off-site copy's bucket, as the service calls it.", example="eu-central-1"
    )
    offsite_folder: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*)?$")] = _setting(
        "", "Folder of the off-site copy in its bucket; empty is the stack's name.", example="memories/prod"
    )
    offsite_interval_minutes: Annotated[int, Field(ge=1, le=59)] = _setting(
        5, "How often the off-site copy is brought in step.", example=5, unit="minutes"
    )
    offsite_ca_certificate: str = _setting(
        "",
        "CA certificate (PEM) of an off-site service with a private CA; empty is whom the system trusts.",
        example="-----BEGIN CERTIFICATE-----…",
    )

    leakproof: bool = _setting(
        True,
        "Mark three built-in functions LEAKPROOF where a superuser exists, so that keyword search can use its index"
        " under row level security.",
        example=True,
    )
    tenant_index_threshold_rows: Annotated[int, Field(ge=1)] = _setting(
        5000, "Memories of one user from which the user gets an HNSW index of its own.", example=5000, unit="rows"
    )
    tenant_index_limit: Annotated[int, Field(ge=0, le=500)] = _setting(
        50, "Users that may have an HNSW index of their own; the largest come first.", example=50, unit="indexes"
    )
    hnsw_m: Annotated[int, Field(ge=2, le=100)] = _setting(16, "HNSW links per node.", example=16)
    hnsw_ef_construction: Annotated[int, Field(ge=4, le=1000)] = _setting(
        128, "HNSW candidates while building.", example=128
    )
    hnsw_ef_search: Annotated[int, Field(ge=1, le=1000)] = _setting(
        100, "HNSW candidates while searching.", example=100
    )

    lock_timeout_ms: Annotated[int, Field(ge=100, le=600_000)] = _setting(
        3000,
        "How long a statement of an application or a migration waits for a lock.",
        example=3000,
        unit="milliseconds",
    )
    statement_timeout_ms: Annotated[int, Field(ge=0, le=86_400_000)] = _setting(
        30_000, "Longest statement of an application; 0 is without limit.", example=30_000, unit="milliseconds"
    )

    base_image: str = _setting(
        versions.BASE_IMAGE, "Image that every image of the stack is built from.", example=versions.BASE_IMAGE
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        problems = []
        if self.hnsw_ef_construction < 2 * self.hnsw_m:
            problems.append(f"hnsw_ef_construction: must be at least twice hnsw_m ({2 * self.hnsw_m})")
        wrong = [name for name in self.public_name_list if not _is_host(name)]
        problems += [f"public_names: `{name}` is neither a host name nor an address" for name in wrong]
        if self.bind_address not in ("127.0.0.1", "::1") and not self.public_name_list:
            problems.append(
                f"public_names: must name what clients connect to, since bind_address is {self.bind_address}"
            )
        if self.postgres_port == self.pool_port:
            problems.append(f"pool_port: must differ from postgres_port ({self.postgres_port})")
        if self.shared_buffers_mb + self.maintenance_work_mem_mb > self.postgres_memory_mb * 3 // 4:
            problems.append(
                f"maintenance_work_mem_mb: {self.maintenance_work_mem_mb} MiB and shared_buffers"
                f" ({self.shared_buffers_mb} MiB) leave less than a quarter of postgres_memory_mb"
                f" ({self.postgres_memory_mb} MiB) for connections"
            )
        # Two transaction pools (read-write, read-only) and one session pool for each of two application roles would
        # be the worst case; PostgreSQL must keep room for administration, replication and backup.
        needed = self.pool_size + self.pool_session_size + RESERVED_CONNECTIONS
        if needed > self.max_connections:
            problems.append(
                f"max_connections: {self.max_connections} is too few for pool_size + pool_session_size +"
                f" {RESERVED_CONNECTIONS} ({needed})"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def public_name_list(self) -> tuple[str, ...]:
        """The names of `public_names` as certificates spell them: small letters, addresses in their short form."""
        parts = (part.strip() for part in self.public_names.split(","))
        return tuple(dict.fromkeys(_spell_host(part) for part in parts if part))

    @property
    def embedding_type(self) -> Literal["vector", "halfvec"]:
        """The column type: `vector` while a PLAIN row fits a page, `halfvec` above."""
        return "vector" if self.embedding_dims <= VECTOR_PLAIN_DIMS_MAX else "halfvec"

    @property
    def embedding_storage(self) -> Literal["plain", "external"]:
        """How the embedding is stored: in the row, or out of line where the row would not fit a page."""
        return "plain" if self.embedding_dims <= HALFVEC_PLAIN_DIMS_MAX else "external"

    @property
    def embedding_operator_class(self) -> str:
        """The operator class of a vector index, for instance `vector_cosine_ops`."""
        return f"{self.embedding_type}_{_OPERATOR_SUFFIX[self.embedding_distance]}"

    @property
    def embedding_operator(self) -> str:
        """The distance operator, for instance `<=>`."""
        return _OPERATOR[self.embedding_distance]

    @property
    def shared_buffers_mb(self) -> int:
        """A quarter of the container's memory, in MiB. Source: PostgreSQL manual, shared_buffers."""
        return self.postgres_memory_mb // 4

    @property
    def shm_size_mb(self) -> int:
        """
        Size of the container's /dev/shm, in MiB.

        A parallel HNSW build keeps its graph of up to `maintenance_work_mem` there; with Docker's default of 64 MiB it
        fails with `could not resize shared memory segment`. The rest is room for parallel queries.
        """
        return self.maintenance_work_mem_mb + 128


def setting_fields() -> dict[str, FieldInfo]:
    """List the settings with their pydantic fields, in the order in which they are documented."""
    return dict(Settings.model_fields)


def environment_name(setting: str) -> str:
    """
    Name the environment variable of a setting.

    >>> environment_name("embedding_dims")
    'MEMHARBOR_EMBEDDING_DIMS'
    """
    return ENVIRONMENT_PREFIX + setting.upper()


def settings_from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Collect the settings that `MEMHARBOR_*` variables carry; other variables of that prefix are left alone."""
    return {
        name: environ[environment_name(name)] for name in Settings.model_fields if environment_name(name) in environ
    }


def load_settings(
    *layers: tuple[str, Mapping[str, Any]], conflicts: Sequence[str] = ()
) -> tuple[Settings, dict[str, str]]:
    """
    Merge layers of settings, the strongest first, and validate the result.

    Args:
        layers: Pairs of an origin (`option`, `environment`, `stack dev`) and the settings it carries.
        conflicts: What is known to be wrong with them beyond what can be seen here; told with the rest.

    Returns:
        The settings, and for each one the origin that decided it (`default` where no layer has it).

    Raises:
        ConfigError: A key is unknown or a value is wrong; the message lists all problems.

    >>> settings, origins = load_settings(("option", {"embedding_dims": 384}), ("environment", {"embedding_dims": "8"}))
    >>> settings.embedding_dims, origins["embedding_dims"], origins["topology"]
    (384, 'option', 'default')
    """
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            if name not in merged:
                merged[name] = value
                origins[name] = origin
    try:
        settings = Settings(**merged)
    except ValidationError as exc:
        problems = _problems(exc, origins) + _problems_of_the_rest(exc, merged, origins)
        raise _refusal([*problems, *conflicts]) from exc
    if conflicts:
        raise _refusal(conflicts)
    return settings, origins


def _refusal(problems: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{len(problems)} wrong setting{'s' if len(problems) > 1 else ''}:\n  " + "\n  ".join(problems),
        hint="see docs/reference/settings.md, or run `memharbor settings show`",
    )


def _problems_of_the_rest(exc: ValidationError, merged: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Check how the good settings fit together, which pydantic does only once every single one is good."""
    wrong = {error["loc"][0] for error in exc.errors() if error["loc"]}
    if not wrong:
        return []
    try:
        Settings(**{name: value for name, value in merged.items() if name not in wrong})
    except ValidationError as rest:
        return _problems(rest, origins)
    return []


def _problems(exc: ValidationError, origins: Mapping[str, str]) -> list[str]:
    problems: list[str] = []
    for error in exc.errors():
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            problems.append(f"{name}: unknown setting (from {origins.get(name, 'unknown')})")
        elif not name:
            problems += str(error["msg"]).removeprefix("Value error, ").splitlines()
        else:
            said = str(error["msg"]).removeprefix("Value error, ")
            problems.append(f"{name}: {said[0].lower()}{said[1:]}, not `{error['input']}` (from {origins[name]})")
    return problems
