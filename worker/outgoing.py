"""Keep an update from its training until it has arrived: a process that dies in between costs no training."""

import logging
from collections.abc import Sequence
from pathlib import Path

from common.messages import Shard
from store.blobs import Blob, disk_errors, hash_file
from worker.jobs import Part
from worker.part_files import PartFiles

logger = logging.getLogger(__name__)

_ANSWER = "answer"  # the sealed answer that tells of the update


class Outgoing(PartFiles):
    """The updates that are on their way: of each part the answer, and its shards by their position.

    The files are not forced to the disk; what a power cut has damaged is noticed, and the part is done again.
    """

    def keep(self, part: Part, shards: Sequence[Path], answer: bytes) -> None:
        """Take over the files of the shards and, as the last step, which makes all of it count, the answer."""
        with disk_errors(self.folder):
            self.forget(part)
            for position, path in enumerate(shards):
                path.replace(self.shard(part, position))
            target = self.path(part, _ANSWER)
            temporary = target.with_name(f".{target.name}")
            temporary.write_bytes(answer)
            temporary.replace(target)

    def find(self, part: Part) -> bytes | None:
        """Return the answer that was kept with the part's update, if there is one."""
        try:
            return self.path(part, _ANSWER).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("Cannot read an update that was to be sent: %s.", error, extra={"action": "find_outgoing"})
            return None

    def is_whole(self, part: Part, shards: Sequence[Shard]) -> bool:
        """Return whether the shards' files are what the answer says."""
        try:
            blobs = [hash_file(self.shard(part, position)) for position in range(len(shards))]
        except OSError:
            return False
        return blobs == [Blob(digest=shard.digest, size=shard.size) for shard in shards]

    def shard(self, part: Part, position: int) -> Path:
        """Return the file of a shard."""
        return self.path(part, str(position))

    def is_sent(self, part: Part, position: int) -> bool:
        """Return whether the shard has arrived where this attempt's references lead."""
        return self._mark(part, position).exists()

    def note_sent(self, part: Part, position: int) -> None:
        """Note that the shard has arrived."""
        with disk_errors(self.folder):
            self._mark(part, position).touch()

    def _mark(self, part: Part, position: int) -> Path:
        return self.path(part, f"{position}.sent.{part.attempt}")
