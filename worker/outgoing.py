"""Keep an update from its training until it has arrived: a process that dies in between costs no training."""

from collections.abc import Sequence
from pathlib import Path

from common.messages import Shard
from store.blobs import Blob, disk_errors, hash_file
from worker.jobs import Part
from worker.part_files import PartFiles


class Outgoing(PartFiles):
    """The updates that are on their way: their shards by position. The answers that tell of them are in the leases.

    The files are not forced to the disk; what a power cut has damaged is noticed, and the part is done again.
    """

    def keep(self, part: Part, shards: Sequence[Path]) -> None:
        """Take over the files of the shards; they count when the answer is kept."""
        with disk_errors(self.folder):
            self.forget(part)
            for position, path in enumerate(shards):
                path.replace(self.shard(part, position))

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
