"""Read every setting once, at a process's edge: variables `FEDCHORD_…`, then one TOML file, then the defaults."""

import math
import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from common.errors import InvalidSettings

ENV_PREFIX = "FEDCHORD_"
CONFIG_VARIABLE = "FEDCHORD_CONFIG"  # names the TOML file


class Settings(BaseSettings):
    """Everything that can be configured; frozen, passed down, never read again from the environment."""

    model_config = SettingsConfigDict(
        frozen=True, env_prefix=ENV_PREFIX, extra="forbid", validate_default=True, env_ignore_empty=True
    )

    # The services
    broker_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey that carries the queues; a site needs no other service but the object store.",
    )
    database_url: SecretStr = Field(
        SecretStr("sqlite:///fedchord.db"),
        description="The coordinator's records: sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
    )
    blob_store: Literal["folder", "s3"] = Field(
        "folder", description="Where tensors lie: a local folder, or MinIO or any other S3 service."
    )
    blob_folder: Path = Field(
        Path("blobs"),
        description="The folder of blob_store = 'folder'; a site accepts file references below it only.",
    )
    s3_endpoint: str = Field("127.0.0.1:9000", description="HOST:PORT of the S3 service, as the sites reach it.")
    s3_access_key: str = Field("", description="The S3 access key; only the coordinator has one.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="The S3 secret key.")
    s3_bucket: str = Field("fedchord", description="The bucket; made at the first start if it is missing.")
    s3_region: str = Field("us-east-1", description="The bucket's region.")
    s3_secure: bool = Field(True, description="Speak TLS to the S3 service.")
    cache_folder: Path = Field(
        Path("cache"), description="Where the coordinator keeps verified copies of what lies in S3."
    )
    cache_gigabytes: float = Field(10.0, gt=0, description="How large cache_folder may grow, in 10^9 bytes.")

    # Signatures
    signing_key_file: Path = Field(
        Path("signing.key"),
        description="This process's own Ed25519 private key (`fedchord sites add` makes a site's).",
    )
    coordinator_public_key: str = Field(
        "", description="A site accepts messages signed by this key only; `fedchord sites add` prints it."
    )

    # The coordinator
    reference_seconds: int = Field(
        24 * 3600,
        ge=1,
        le=7 * 24 * 3600,
        description="The longest round deadline that a job may have, in seconds: so long its references can be used.",
    )
    shard_megabytes: int = Field(
        256,
        ge=1,
        le=4096,
        description="A model is stored in shards of at most this size, in MiB. An upload that is cut begins its shard "
        "anew, so where links are bad take less, 16 perhaps.",
    )
    initial_shards: int = Field(
        16, ge=1, le=1024, description="How many shards a site may send when it builds a job's first model."
    )
    sweep_seconds: float = Field(
        1.0,
        gt=0,
        description="How often deadlines are checked and interrupted steps taken up again, in seconds.",
    )
    lease_seconds: float = Field(
        3.0, gt=0, description="How long an aggregation may go without a sign of life, in seconds."
    )
    ask_again_seconds: float = Field(
        5.0,
        gt=0,
        description="After how long a site that is alive, idle and owes an answer is asked again, in seconds.",
    )
    quarantine_days: float = Field(
        14.0, gt=0, description="How long the bytes of a quarantined update are kept unless a person decides, in days."
    )
    choosers: dict[str, str] = Field(
        {},
        description='Functions of your own that choose whom a round asks: name = "module:function"; a job file names '
        "one as [participation] choose.",
    )
    keep_updates_days: float = Field(
        30.0,
        ge=0,
        description="How long the bytes of sites' updates are kept after their job has ended, in days. inf: for ever.",
    )
    keep_updates_gigabytes: float = Field(
        math.inf,
        ge=0,
        description="How large all updates together may be, in 10^9 bytes; the oldest go first. inf: no bound.",
    )
    keep_models_days: float = Field(
        math.inf,
        ge=0,
        description="How long the bytes of a job's global models, but for its last one, are kept after its end, in "
        "days. inf: for ever.",
    )
    keep_models_gigabytes: float = Field(
        math.inf,
        ge=0,
        description="How large they all may be together, in 10^9 bytes; the oldest go first. inf: no bound.",
    )
    coordinator_threads: int = Field(4, ge=1, description="How many messages a coordinator worker handles at once.")

    # The model store's service
    http_host: str = Field(
        "127.0.0.1",
        description="The address at which the model store's service listens; with open access, loopback only.",
    )
    http_port: int = Field(8790, ge=0, le=65535, description="Its port; 0 takes any free one.")
    http_access: Literal["open", "keys"] = Field(
        "open",
        description="'open': everybody on this machine may do everything; 'keys': tenants with an API key and secret.",
    )
    http_idle_seconds: float = Field(
        60.0, gt=0, description="How long an upload to the service may go without a byte, in seconds."
    )
    max_model_gigabytes: float = Field(
        100.0, gt=0, description="The largest file that the service takes, in 10^9 bytes."
    )
    max_meta_kilobytes: int = Field(
        64, ge=1, le=4096, description="The largest model_meta that is kept, as JSON, in KiB."
    )
    keep_unused_hours: float = Field(
        24.0,
        ge=0,
        description="For how many hours bytes are left alone that no model needs, or whose model has expired.",
    )
    tenant_id: str = Field(
        "", max_length=100, description="The id of this node's own organisation, for upstream stores."
    )
    tenant_name: str = Field("", max_length=200, description="Its name, for people.")
    upstream_url: str = Field(
        "", description="The service that the operator's model stores feed, unless a store has an upstream of its own."
    )
    upstream_api_key: str = Field("", description="This node's API key there.")
    upstream_secret: SecretStr = Field(SecretStr(""), description="This node's secret there.")
    upstream_timeout_seconds: float = Field(
        30.0, gt=0, description="How long an upstream may go without a byte, in seconds."
    )
    store_key_file: Path = Field(
        Path("store.key"), description="The key that encrypts the upstreams' secrets in the records; made when missing."
    )

    # The model store's client
    store_url: str = Field("http://127.0.0.1:8790", description="The service that `store.client.Api()` speaks to.")
    store_api_key: str = Field("", description="The API key that it sends.")
    store_secret: SecretStr = Field(SecretStr(""), description="The secret that it sends.")

    # The site
    site_name: str = Field("", description="The site's name: 1 to 63 lower-case letters, digits, hyphens.")
    site_data: Path = Field(Path("data"), description="The data that trainers at this site may read.")
    site_trainers: dict[str, str] = Field(
        {},
        description='What may run at this site: trainer name = "module:Class". Anything else is declined.',
    )
    site_folder: Path = Field(
        Path("site-state"),
        description="Scratch space, what is being fetched and sent, and the receipts of finished parts; "
        "survives restarts.",
    )
    site_slots: int = Field(1, ge=1, description="How many parts the site works on at once, each in its own process.")
    site_nice: int = Field(
        5,
        ge=0,
        le=19,
        description="By how much the processes that work on parts give way to others on the machine, as with nice(1): "
        "so the worker goes on telling that it is alive while a training takes every core.",
    )
    heartbeat_seconds: float = Field(
        2.0,
        gt=0,
        description="How often a site tells that it is alive; it counts as gone after two and a half times that.",
    )
    transfer_timeout_seconds: float = Field(
        60.0, gt=0, description="How long a transfer may go without receiving or sending a byte, in seconds."
    )
    transfer_patience_seconds: float = Field(
        600.0,
        gt=0,
        description="How long a transfer is tried again without one byte of progress before the part fails, in "
        "seconds; never past the part's deadline.",
    )
    visibility_timeout_seconds: int = Field(
        8 * 24 * 3600,  # longer than any part takes; what a killed worker held is taken up earlier, at its next start
        ge=1,
        description="After how long the broker hands a message out again that nobody has acknowledged, in seconds.",
    )

    # Logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least level logged.")
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object a line.")
    log_folder: Path | None = Field(
        None, description="Where an embedded stack's logs lie; `fedchord up` sets it. Old ones there are removed."
    )
    keep_logs_days: float = Field(
        30.0,
        ge=0,
        description="How long logs in log_folder are kept after their last line, in days. inf: for ever.",
    )
    keep_logs_megabytes: float = Field(
        30.0,
        ge=1,
        description="How large the logs of one process of an embedded stack may be, in 10^6 bytes, from the next "
        "`fedchord up` on. inf: no bound.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let variables win over what `load` read from the file."""
        return env_settings, init_settings

    @classmethod
    def load(cls, config: Path | None = None) -> Self:
        """Read the variables and the TOML file; raise InvalidSettings that names each wrong field.

        Relative paths in the file, and the defaults beside it, are relative to the file, so that a stack or a site's
        kit can be used from any folder.
        """
        if config is None and (named := os.environ.get(CONFIG_VARIABLE)):
            config = Path(named)
        values = _read_toml(config) if config is not None else {}
        _check_variables(cls)
        try:
            return cls(**values)
        except ValidationError as error:
            raise InvalidSettings(_explain(error, config)) from error

    @property
    def shard_bytes(self) -> int:
        """Return the largest size of a shard in bytes."""
        return self.shard_megabytes * 2**20


def _read_toml(config: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(config.read_text("utf-8"))
    except OSError as error:
        raise InvalidSettings(f"Cannot read the settings file {config}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"The settings file {config} is not valid TOML: {error}.") from error
    for name, field in Settings.model_fields.items():
        if field.annotation in (Path, Path | None) and isinstance(path := values.get(name, field.default), str | Path):
            values[name] = config.resolve().parent / path
    return values


def _check_variables(cls: type[Settings]) -> None:
    """Refuse a misspelt variable; pydantic-settings would pass over it in silence."""
    known = {ENV_PREFIX + name.upper() for name in cls.model_fields} | {CONFIG_VARIABLE}
    if unknown := sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known):
        raise InvalidSettings(f"Unknown variable {', '.join(unknown)}; docs/reference/settings.md lists them all.")


def _explain(error: ValidationError, config: Path | None) -> str:
    where = f"{config} or the variables" if config else "the variables"
    lines = [
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    ]
    return f"Settings in {where} are not valid: " + "; ".join(lines) + "."
