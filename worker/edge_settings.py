"""The file `edge.toml` in a site's data: which edge trains in the site's place, and how."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError

from common.errors import Declined

EDGE_FILE = "edge.toml"


class EdgeSettings(BaseModel):
    """What `edge.toml` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(min_length=1, max_length=2000)  # of the edge's own HTTP service
    api_key: str = Field("", max_length=500)  # an operator's there; needed unless its access is open
    secret: SecretStr = SecretStr("")
    rounds: int = Field(1, ge=1, le=1000)  # training rounds at the edge within one of the centre's
    trainer: str | None = Field(None, min_length=1, max_length=100)  # its name at the edge's sites, if another one
    min_sites: int | None = Field(None, ge=1)  # the edge's quorum; more than half of its sites if it is missing
    strategy: dict[str, JsonValue] = {}  # the edge's own way to join its sites' updates, as in a job file
    timeout_seconds: float = Field(30.0, gt=0)  # that the service may go without a byte
    patience_seconds: float = Field(60.0, gt=0)  # that the service may be away before a part fails


def read_edge_settings(folder: Path) -> EdgeSettings:
    """Return what the folder's `edge.toml` says; raise Declined that names what is wrong with it."""
    path = folder / EDGE_FILE
    try:
        return EdgeSettings.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise Declined(
            f"This site's {EDGE_FILE} cannot be read ({error.strerror}); its admin must write it."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Declined(f"This site's {EDGE_FILE} is not valid TOML; its admin must correct it.") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise Declined(f"This site's {EDGE_FILE} is not valid: {problems}. Its admin must correct it.") from error
