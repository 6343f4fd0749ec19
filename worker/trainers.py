"""The site's own list of what may run here: trainer name -> class."""

import importlib
import importlib.util
import logging
from collections.abc import Mapping

from common.errors import Declined, InvalidSettings
from worker.trainer import JobContext, Trainer

logger = logging.getLogger(__name__)


class Trainers:
    """The trainers that the site's admin allows; their code is imported when it is first needed."""

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._classes = dict(classes)  # name -> "module:Class"
        self._loaded: dict[str, type[Trainer]] = {}

    @property
    def names(self) -> list[str]:
        """Return the trainers' names, sorted."""
        return sorted(self._classes)

    def check(self) -> None:
        """Raise InvalidSettings unless every trainer's module exists; nothing of it is run."""
        for name, path in self._classes.items():
            module, colon, class_name = path.partition(":")
            if not colon or not module or not class_name.isidentifier():
                raise InvalidSettings(f"site_trainers: {name} = {path!r} is not 'module:Class'; correct it.")
            try:
                found = importlib.util.find_spec(module)
            except (ImportError, ValueError) as error:
                raise InvalidSettings(f"site_trainers: {name} = {path!r} cannot be found ({error}).") from error
            if found is None:
                raise InvalidSettings(
                    f"site_trainers: {name} = {path!r} names a module that is not there; install it, or start the "
                    "worker in its folder."
                )

    def warm_up(self) -> None:
        """Import every trainer ahead of its first use; what fails will be told when it is asked for."""
        for name in self.names:
            try:
                self.load(name)
            except Declined as error:
                logger.warning("%s", error.message, extra={"action": "load_trainer", "trainer": name})

    def make(self, context: JobContext) -> Trainer:
        """Return a new trainer for the job; raise Declined when it is not allowed or cannot be imported."""
        return self.load(context.trainer)(context)

    def load(self, name: str) -> type[Trainer]:
        """Return the trainer's class; raise Declined when it is not on the list or cannot be imported."""
        if name not in self._classes:
            raise Declined(
                f"Trainer {name[:80]!r} is not on this site's list ({', '.join(self.names) or 'which is empty'}); "
                "ask the site's admin to add it to site_trainers."
            )
        if name not in self._loaded:
            self._loaded[name] = _import_class(name, self._classes[name])
        return self._loaded[name]


def _import_class(name: str, path: str) -> type[Trainer]:
    module, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except Exception as error:  # whatever the admin's module does when it is imported
        logger.exception("Cannot import trainer %s.", name, extra={"action": "load_trainer", "trainer": name})
        raise Declined(
            f"Trainer {name!r} cannot be imported at this site ({type(error).__name__}); its log has the reason."
        ) from error
    if not isinstance(found, type) or not issubclass(found, Trainer):
        raise Declined(
            f"Trainer {name!r} is not a subclass of worker.trainer.Trainer; the site's admin must correct it."
        )
    return found
