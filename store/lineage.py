"""Follow a model to those that it was made from, back to the first."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection

from store.models import ModelInfo, find_by_id, get_model, parts_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """A model and those it was made from."""

    model_id: str
    model: ModelInfo | None  # None if it was deleted, or may not be seen
    parents: tuple["Lineage", ...] = ()
    followed: bool = True  # False if its parents are shown elsewhere, or are more than was asked for

    def walk(self) -> Iterator[tuple[int, "Lineage"]]:
        """Yield this one and all it comes from, each with its depth and before its parents."""
        waiting = [(0, self)]
        while waiting:
            depth, lineage = waiting.pop()
            yield depth, lineage
            waiting.extend((depth + 1, parent) for parent in reversed(lineage.parents))


def lineage(
    connection: Connection,
    model_id: str,
    *,
    stores: Collection[str] | None = None,  # a model in another one is as if it were deleted; None: all are followed
    max_models: int = 10_000,
    max_parents: int = 100_000,  # of all models together, for anybody can name any number of parents
) -> Lineage:
    """Return the model with all it comes from, a parent that several share being followed only once.

    Of a lineage of more, the nearest are returned. Raise NotFound if there is no such model.
    """
    models: dict[str, ModelInfo | None] = {model_id: get_model(connection, model_id)}
    level = [model_id]
    while level:
        wanted = dict.fromkeys(parent for child in level for parent in _parents(models[child]) if parent not in models)
        level = []
        for some in parts_of(
            list(wanted)[: max_models - len(models)], 50
        ):  # with all their parents, they are in memory
            found = find_by_id(connection, some)
            for parent in some:
                model = found.get(parent)
                if model is not None and stores is not None and model.store not in stores:
                    model = None
                max_parents -= len(_parents(model))
                if max_parents < 0:
                    return _nested(models)
                models[parent] = model
                level.append(parent)
    return _nested(models)


def _nested(models: dict[str, ModelInfo | None]) -> Lineage:
    """Nest models that are in the order of their generations, from the oldest to the first, without recursion."""
    place: dict[str, str] = {}  # the child under which a model is followed
    for child, model in models.items():
        for parent in _parents(model):
            place.setdefault(parent, child)
    root = next(iter(models))
    done: dict[str, Lineage] = {}
    for child, model in reversed(models.items()):
        parents = tuple(
            done[parent]
            if parent in done and place[parent] == child
            else Lineage(model_id=parent, model=models.get(parent), followed=False)
            for parent in _parents(model)
        )
        done[child] = Lineage(model_id=child, model=model, parents=parents)
    return done[root]


def _parents(model: ModelInfo | None) -> tuple[str, ...]:
    return () if model is None else tuple(dict.fromkeys(model.parents))
