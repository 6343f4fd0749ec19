"""The kinds of round, and the states of rounds and of parts.

A round:   open ─▶ aggregating ─▶ closed | failed      and from each that is not terminal: ─▶ aborted
A part:    waiting ─▶ accepted | quarantined | declined | failed | dropped
           waiting ─▶ late ─▶ kept ─▶ accepted         its round has closed; it counts in a later one
"""

from enum import StrEnum

from common.queues import Kind


class RoundKind(StrEnum):
    """What a round asks of its sites."""

    START = "start"  # check the trainer; one site may build the first model
    TRAIN = "train"
    TEST = "test"
    SWAG = "swag"


MESSAGE_KINDS = {
    RoundKind.START: Kind.TRAINING_START,
    RoundKind.TRAIN: Kind.UPDATE_ROUND_START,
    RoundKind.TEST: Kind.MODEL_TEST_ROUND,
    RoundKind.SWAG: Kind.SWAG_ROUND_START,
}


class RoundState(StrEnum):
    """Where a round is."""

    OPEN = "open"  # asked, or about to be; answers count
    AGGREGATING = "aggregating"  # one process holds a lease on it and puts the answers together
    CLOSED = "closed"  # terminal
    FAILED = "failed"  # terminal: no quorum, or no way to put the answers together
    ABORTED = "aborted"  # terminal: the job ended


class PartState(StrEnum):
    """Where one site's share of a round is."""

    WAITING = "waiting"  # no answer yet
    ACCEPTED = "accepted"  # the answer passed the gate
    QUARANTINED = "quarantined"  # the gate refused the update; it is kept with the reason
    DECLINED = "declined"  # the site would not
    FAILED = "failed"  # the site tried and could not
    DROPPED = "dropped"  # not waited for any more
    LATE = "late"  # its round has ended without it; the answer may still count in a later round
    KEPT = "kept"  # such an answer has passed the gate and counts in the next training round


OWING = (PartState.WAITING, PartState.LATE)  # the site has yet to answer
