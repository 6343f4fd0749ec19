"""Find models by what people type: the beginning of an id, a job, a kind, a state."""

from typing import Any

from common.errors import InvalidInput, NotFound
from coordinator.cli.reach import StoreApi
from store.models import ModelState

Model = dict[str, Any]  # a model_info, as the model store's methods return it

STATES = {state.name.lower(): int(state) for state in ModelState}


def find_model(api: StoreApi, beginning: str, ddc: str | None = None) -> Model:
    """Return the model, of any store or of one, whose id is, or alone begins with, the text.

    Raise NotFound if there is none or more than one.
    """
    found = _find(api, {"like": ["model_id", f"{_plain(beginning)}%"]}, ddc, limit=2)
    exact = [model for model in found if model["model_id"] == beginning]
    if not found:
        raise NotFound(f"There is no model whose id begins with {beginning!r}; `fedchord models` lists them.")
    if len(found) > 1 and not exact:
        raise NotFound(f"More than one model has an id that begins with {beginning!r}; `fedchord models` lists them.")
    return (exact or found)[0]


def find_models(
    api: StoreApi,
    *,
    ddc: str | None = None,
    job: str | None = None,
    kind: str | None = None,
    state: str | None = None,
    round: int | None = None,
    limit: int,
) -> list[Model]:
    """Return the newest models, of all stores or of one, for which all that is given holds."""
    equal = {"model_kind": kind, "model_state": None if state is None else STATES[state], "round": round}
    terms: list[dict[str, object]] = [{"=": [name, value]} for name, value in equal.items() if value is not None]
    if job is not None:
        terms.append({"like": ["job_id", f"{_plain(job)}%"]})
    return _find(api, {"and": terms} if terms else None, ddc, limit=limit)


def newest_of_job(api: StoreApi, beginning: str) -> Model:
    """Return the newest global model of the job whose id begins so; raise NotFound if there is none."""
    found = find_models(api, job=beginning, kind="global", limit=1)
    if not found:
        raise NotFound(
            f"No job whose id begins with {beginning!r} has a global model yet; `fedchord jobs` lists the jobs."
        )
    job_id = found[0]["job_id"]
    others = {"and": [{"like": ["job_id", f"{_plain(beginning)}%"]}, {"!=": ["job_id", job_id]}]}
    if job_id != beginning and _find(api, others, None, limit=1):
        raise NotFound(f"More than one job has an id that begins with {beginning!r}; `fedchord jobs` lists them.")
    return found[0]


def _find(api: StoreApi, conditions: dict[str, Any] | None, ddc: str | None, *, limit: int) -> list[Model]:
    """Return the newest, which a service names first, of all stores that can be seen, or of one."""
    stores = [ddc] if ddc is not None else [store["model_store_ddc"] for store in api.get_stores()]
    found: list[Model] = []
    for name in stores:
        found += api.get_models(name, conds=conditions, limit=limit)
    return sorted(found, key=lambda model: model["created_at"], reverse=True)[:limit]


def _plain(beginning: str) -> str:
    """Return the text; raise InvalidInput if it means something in a pattern, which no id does."""
    if not beginning or not beginning.replace("-", "").isalnum():
        raise InvalidInput(f"{beginning!r} is no id; write its first letters, digits and hyphens.")
    return beginning
