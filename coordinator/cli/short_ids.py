"""Take a shortened id for the one that it stands for."""

from collections.abc import Iterable

from common.errors import NotFound


def pick_id(ids: Iterable[str], beginning: str, *, what: str, command: str) -> str:
    """Return the id that is, or alone begins with, the text; raise NotFound that names the command which lists them."""
    found = [each for each in ids if each.startswith(beginning)]
    if beginning in found:
        return beginning
    if len(found) != 1 or not beginning:
        trouble = f"More than one {what} has an id that begins" if found else f"There is no {what} whose id begins"
        raise NotFound(f"{trouble} with {beginning!r}; `fedchord {command}` lists them.")
    return found[0]
