"""Make a round's model: gather what it is computed with, put it together, describe what came of it."""

import resource
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from sqlalchemy import Connection

from common.errors import InvalidTensors
from coordinator.aggregation import Contribution, Moments, aggregate, state_schema, weighted_metrics
from coordinator.jobfile import StrategyTable
from coordinator.jobs import Job
from coordinator.model_weights import model_weights
from coordinator.parts import Part
from coordinator.rounds import Round
from coordinator.services import Services
from coordinator.states import RoundKind
from coordinator.strategies.base import Strategy
from coordinator.strategies.optimizer import ServerOptimizer
from store.database import reading
from store.index import Weights
from store.models import ModelInfo, ModelState, get_model, get_models
from store.pieces import WeightsReader, WeightsWriter
from store.tables import utc_now
from store.tensors import Schema

OPTIMIZER = "optimizer"  # the kind of a model that holds an optimizer's tensors, and where a global model names it


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a model is computed with."""

    strategy: Strategy
    updates: tuple[ModelInfo, ...]  # in the order of aggregation
    staleness: tuple[int, ...]  # of each update, in rounds
    discount: float = 0.0  # of the stale ones
    bases: Mapping[str, ModelInfo] = field(default_factory=dict)  # that stale updates were trained from, by id
    current: ModelInfo | None = None  # the round's input model, if there is a stale update or an optimizer
    before: ModelInfo | None = None  # what the optimizer has kept of the rounds before; None: nothing

    @property
    def has_state(self) -> bool:
        """Return whether an optimizer steps, and something is kept of it."""
        return isinstance(self.strategy, ServerOptimizer) and self.current is not None


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What is computed by a recipe."""

    weights: Weights
    state: Weights | None = None  # what the optimizer keeps


@dataclass(frozen=True, kw_only=True)
class Made:
    """The model that came of a round, not recorded yet."""

    model: ModelInfo
    also: tuple[ModelInfo, ...] = ()  # to be recorded with it, and before it, so that the model is the newest


def make_model(services: Services, job: Job, round_: Round, accepted: Sequence[Part]) -> Made | None:
    """Return the model that came of the round: aggregated, or built by a site; None after a test.

    The updates are taken by site, and of one site by the round that they were trained in, whatever order they came in.
    """
    if round_.kind is RoundKind.TEST:
        return None
    with reading(services.engine) as connection:
        updates = get_models(connection, [part.model_id for part in accepted if part.model_id is not None])
        if round_.kind is RoundKind.START:
            return Made(model=updates[0]) if updates else None
        updates = tuple(sorted(updates, key=lambda update: (update.site or "", update.round)))
        part_of = {part.model_id: part for part in accepted}
        accepted = [part_of[update.model_id] for update in updates]
        recipe = _write_recipe(connection, job, round_, updates)
    combined = aggregate_updates(services, recipe)
    also = () if combined.state is None else (_describe_state(job, round_, recipe, combined.state),)
    return Made(model=_describe_model(job, round_, accepted, recipe, combined.weights, also), also=also)


def staleness_of(update: ModelInfo, number: int) -> int:
    """Return how many rounds before the round of this number the update was trained in."""
    return max(0, number - update.round)


def state_id(model: ModelInfo, strategy: StrategyTable) -> str | None:
    """Return the id of what the strategy's optimizer has kept when it made the model; None if it did not make it.

    A model that somebody has put says of itself whatever they like, so it is asked only if a job of ours made it.
    """
    recorded = model.model_meta.get(OPTIMIZER)
    if model.job_id is None or model.site is not None or not isinstance(recorded, Mapping):
        return None
    return str(recorded["model_id"]) if recorded["strategy"] == strategy.name else None


def _write_recipe(connection: Connection, job: Job, round_: Round, updates: tuple[ModelInfo, ...]) -> Recipe:
    strategy = job.spec.strategy.make()
    if round_.kind is RoundKind.SWAG or round_.input_model_id is None:  # moments are averaged; they are no step
        return Recipe(strategy=strategy, updates=updates, staleness=(0,) * len(updates))
    staleness = tuple(staleness_of(update, round_.number) for update in updates)
    base_ids = sorted({update.parents[0] for update, rounds in zip(updates, staleness, strict=True) if rounds})
    current: ModelInfo | None = None
    before: ModelInfo | None = None
    if base_ids or isinstance(strategy, ServerOptimizer):
        current = get_model(connection, round_.input_model_id)
    if isinstance(strategy, ServerOptimizer) and current is not None:
        found = state_id(current, job.spec.strategy)
        before = None if found is None else get_model(connection, found)
    return Recipe(
        strategy=strategy,
        updates=updates,
        staleness=staleness,
        discount=job.spec.late.discount,
        bases={base.model_id: base for base in get_models(connection, base_ids)},
        current=current,
        before=before,
    )


def aggregate_updates(services: Services, recipe: Recipe) -> Combined:
    """Store what the recipe's strategy makes of its updates, in bounded pieces and in their order; return it."""
    weights = [model_weights(services.blobs, update) for update in recipe.updates]
    schema = weights[0].schema
    with ExitStack() as stack:

        def read(each: Weights) -> WeightsReader:
            return stack.enter_context(WeightsReader(services.blobs, each))

        def write(schema: Schema) -> WeightsWriter:
            return stack.enter_context(WeightsWriter(services.blobs, schema, services.settings.shard_bytes))

        # each reader's shard, and the next one while threads are between the two
        _allow_open_files(2 * (len(weights) + len(recipe.bases)) + 256)
        bases = {base_id: read(model_weights(services.blobs, base)) for base_id, base in recipe.bases.items()}
        contributions = [
            Contribution(
                update=read(each),
                num_examples=update.num_examples or 0,
                staleness=rounds,
                base=bases[update.parents[0]] if rounds else None,
            )
            for update, each, rounds in zip(recipe.updates, weights, recipe.staleness, strict=True)
        ]
        current = None if recipe.current is None else read(model_weights(services.blobs, recipe.current))
        target, after, before = write(schema), None, None
        if isinstance(recipe.strategy, ServerOptimizer) and recipe.has_state:
            kept = state_schema(recipe.strategy, schema)
            after = write(kept)
            if recipe.before is not None:
                known = _state_weights(services, recipe.before, kept)
                before = {state: read(known) for state in recipe.strategy.state_names}
        aggregate(
            recipe.strategy,
            schema,
            contributions,
            target,
            current=current,
            discount=recipe.discount,
            moments=None if after is None else Moments(before=before, after=after),
        )
        return Combined(weights=target.finish(), state=None if after is None else after.finish())


def _state_weights(services: Services, state: ModelInfo, schema: Schema) -> Weights:
    weights = model_weights(services.blobs, state)
    if weights.schema != schema:
        raise InvalidTensors(
            f"Model {state.model_id} is not what the strategy's optimizer keeps for this model; start a job from the "
            "last global model with another strategy."
        )
    return weights


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit of open files if it is lower and the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count and soft != resource.RLIM_INFINITY:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _describe_model(
    job: Job, round_: Round, accepted: Sequence[Part], recipe: Recipe, weights: Weights, also: Sequence[ModelInfo]
) -> ModelInfo:
    """Return the record of the model, with all that is needed to compute it again."""
    kind = "moments" if round_.kind is RoundKind.SWAG else "global"
    meta: dict[str, object] = {
        "trainer": job.spec.trainer,
        "strategy": job.spec.strategy.model_dump(),
        "sites": [update.site for update in recipe.updates],
    }
    if any(recipe.staleness):
        meta |= {"staleness": list(recipe.staleness), "discount": recipe.discount}  # staleness in the order of sites
    for state in also:
        meta[OPTIMIZER] = {
            "model_id": state.model_id,
            "digest": state.model_hash,
            "strategy": job.spec.strategy.name,
        }
    return ModelInfo(
        store=job.model_store,
        model_kind=kind,
        model_description=f"{job.name}: {kind} after {round_.title}",
        model_meta=meta,
        model_state=ModelState.AGGREGATED,
        model_hash=weights.index.digest,
        index_hash=weights.index.digest,
        model_size=weights.size,
        round=round_.number,
        start_datetime=round_.created_at,
        end_datetime=utc_now(),
        parents=tuple(id_ for id_ in (round_.input_model_id, *(update.model_id for update in recipe.updates)) if id_),
        job_id=job.job_id,
        num_examples=sum(update.num_examples or 0 for update in recipe.updates),
        metrics=weighted_metrics([part.metrics for part in accepted], [part.num_examples or 0 for part in accepted]),
        shards=weights.shards,
    )


def _describe_state(job: Job, round_: Round, recipe: Recipe, weights: Weights) -> ModelInfo:
    """Return the record of what the optimizer keeps.

    It is not called aggregated, so that nobody who asks for the newest aggregated model is given it.
    """
    origins = (recipe.before, recipe.current)
    return ModelInfo(
        store=job.model_store,
        model_kind=OPTIMIZER,
        model_description=f"{job.name}: the optimizer's moments after {round_.title}",
        model_meta={"strategy": job.spec.strategy.model_dump()},
        model_state=ModelState.CREATED,
        model_hash=weights.index.digest,
        index_hash=weights.index.digest,
        model_size=weights.size,
        round=round_.number,
        start_datetime=round_.created_at,
        end_datetime=utc_now(),
        parents=tuple(origin.model_id for origin in origins if origin is not None),
        job_id=job.job_id,
        shards=weights.shards,
    )
