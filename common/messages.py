"""The messages between coordinator and sites: frozen, versioned, msgpack, signed.

A message carries references, never tensors. On the queue it is one envelope, a msgpack list

    [version, kind, sender, recipient, body, signature]

whose signature (Ed25519) covers everything before it, so that a message can neither be altered nor be passed on to
somebody else. A new field needs a default; a field never changes its type; what this version does not know is ignored.
"""

from typing import Annotated, ClassVar, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from common.errors import InvalidMessage, UnknownKind, UnknownVersion
from common.queues import AnswerKind, Kind
from common.signing import SigningKey, verify

VERSION = 1
COORDINATOR = "coordinator"  # the sender or recipient that is not a site
MAX_METRICS = 1000  # in an answer
MAX_METRIC_CHARACTERS = 200  # of a metric's name
MAX_MESSAGE_BYTES = 4 * 2**20  # a message of references is a few kB; more is refused unread

_DIGEST = Field(pattern=r"^[0-9a-f]{64}$")
_IDENTIFIER = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,159}$")  # safe as a key and as a file's name


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Shard(_Data):
    """One file of a model or an update."""

    digest: str = _DIGEST  # BLAKE3, hexadecimal
    size: int = Field(ge=0)  # bytes


class SourceShard(Shard):
    """A shard that the recipient may fetch."""

    url: str  # short-lived reference


class ModelReference(_Data):
    """A model in the object store."""

    model_id: str
    digest: str = _DIGEST  # of the model's index
    shards: tuple[SourceShard, ...]


class Message(_Data):
    """What every message has."""

    kind: ClassVar[Kind | AnswerKind]

    job_id: str = _IDENTIFIER
    job_name: str = Field("", max_length=200)


class _Part(Message):
    """A message that asks a site for an answer before the deadline."""

    round: int = Field(ge=0)  # 0 before the first training round
    task_id: str = _IDENTIFIER  # names the part: one site's share of one round
    attempt: int = Field(1, ge=1)  # a higher one replaces a lower one
    deadline_at: FiniteFloat  # unix time, seconds, by the broker's clock
    trainer: str  # a name on the site's own list
    config: dict[str, JsonValue] = {}  # the trainer's
    seed: int = 0  # of the job


class _Upload(_Part):
    """A message that asks for tensors."""

    shard_bytes: int = Field(ge=1)
    upload_urls: tuple[str, ...] = ()  # short-lived references, one for each shard that may be sent


class TrainingStart(_Upload):
    """Begin a job: check the trainer and, if asked, build the first model from the seed."""

    kind = Kind.TRAINING_START

    build_model: bool = False


class UpdateRoundStart(_Upload):
    """Train the global model."""

    kind = Kind.UPDATE_ROUND_START

    model: ModelReference


class ModelTestRound(_Part):
    """Evaluate the global model."""

    kind = Kind.MODEL_TEST_ROUND

    model: ModelReference


class SwagRoundStart(_Upload):
    """Train on from the global model and send the first and second moments of the weights.

    Source: Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning, arXiv 1902.02476.
    """

    kind = Kind.SWAG_ROUND_START

    model: ModelReference


class TrainingFinished(Message):
    """The job has ended; a model that is named is the final one."""

    kind = Kind.TRAINING_FINISHED

    state: str
    reason: str = ""
    model: ModelReference | None = None


class ClientRemoved(Message):
    """The site takes no further part in the job."""

    kind = Kind.CLIENT_REMOVED

    reason: str


class UpdateReady(Message):
    """A part is done: the update lies in the store, or, after a test, the metrics are here."""

    kind = AnswerKind.UPDATE_READY

    round: int = Field(ge=0)
    task_id: str = _IDENTIFIER
    attempt: int = Field(1, ge=1)
    num_examples: int
    # None: measured, but not a finite number
    metrics: dict[Annotated[str, Field(max_length=MAX_METRIC_CHARACTERS)], FiniteFloat | None] = Field(
        {}, max_length=MAX_METRICS
    )
    shards: tuple[Shard, ...] = ()
    seconds: FiniteFloat = 0.0  # the site's work, until the update is written


class PartDeclined(Message):
    """A part will not be done."""

    kind = AnswerKind.PART_DECLINED

    job_id: str = ""  # empty when the task could not be read
    task_id: str = _IDENTIFIER
    attempt: int = Field(1, ge=1)
    failed: bool = False  # tried and failed, not refused
    reason: str = Field(max_length=2000)


SITE_MESSAGES: dict[str, type[Message]] = {
    message.kind.value: message
    for message in (
        TrainingStart, UpdateRoundStart, ModelTestRound, SwagRoundStart, TrainingFinished, ClientRemoved
    )
}  # fmt: skip
ANSWERS: dict[str, type[Message]] = {message.kind.value: message for message in (UpdateReady, PartDeclined)}


class Envelope(BaseModel):
    """A message in transit; nothing in it is to be believed before `open` has returned."""

    model_config = ConfigDict(frozen=True)

    version: int
    kind: str
    sender: str
    recipient: str
    body: bytes
    signature: bytes

    @classmethod
    def seal(cls, message: Message, *, sender: str, recipient: str, key: SigningKey) -> bytes:
        """Return the signed envelope's bytes."""
        body = msgpack.packb(message.model_dump(mode="json"))
        head = [VERSION, message.kind.value, sender, recipient, body]
        packed: bytes = msgpack.packb([*head, key.sign(_signed(head))])
        return packed

    @classmethod
    def read(cls, data: object) -> Self:
        """Return the envelope in the bytes; raise InvalidMessage or UnknownVersion."""
        if not isinstance(data, bytes) or len(data) > MAX_MESSAGE_BYTES:
            raise InvalidMessage("The message is not an envelope of FedChord, or larger than 4 MiB.")
        try:
            fields = msgpack.unpackb(data)
        except (ValueError, msgpack.UnpackException) as error:
            raise InvalidMessage("The message is not valid msgpack.") from error
        if not isinstance(fields, list) or not fields or not isinstance(fields[0], int):
            raise InvalidMessage("The message is not an envelope of FedChord.")
        if fields[0] != VERSION:
            raise UnknownVersion(
                f"The message has version {fields[0]}, this installation speaks version {VERSION}; upgrade the older."
            )
        if len(fields) != len(cls.model_fields):
            raise InvalidMessage(f"The envelope has {len(fields)} fields instead of {len(cls.model_fields)}.")
        try:
            return cls.model_validate(dict(zip(cls.model_fields, fields, strict=True)), strict=True)
        except ValidationError as error:
            raise InvalidMessage("The envelope's fields have wrong types.") from error

    def claimed_task_id(self) -> str:
        """Return the task id that the body names, to look the signer up by; raise InvalidMessage if it names none."""
        try:
            task_id = msgpack.unpackb(self.body)["task_id"]
        except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
            raise InvalidMessage("The message does not say which task it is about.") from error
        if not isinstance(task_id, str):
            raise InvalidMessage("The message does not say which task it is about.")
        return task_id

    def open(self, messages: dict[str, type[Message]], *, recipient: str, public_key: str) -> Message:
        """Return the message; raise InvalidMessage unless it is meant for the recipient and signed by the key."""
        verify(
            public_key,
            self.signature,
            _signed([self.version, self.kind, self.sender, self.recipient, self.body]),
        )
        if self.recipient != recipient:
            raise InvalidMessage(f"The message is meant for {self.recipient[:100]!r}, not for {recipient!r}.")
        if (message := messages.get(self.kind)) is None:
            raise UnknownKind(f"The message kind {self.kind[:100]!r} is not known here; upgrade this installation.")
        try:
            return message.model_validate(msgpack.unpackb(self.body))
        except (ValueError, msgpack.UnpackException) as error:
            raise InvalidMessage(f"The {message.kind} message is not valid: {_first(error)}.") from error


def _signed(head: list[object]) -> bytes:
    packed: bytes = msgpack.packb(head)
    return b"fedchord" + packed


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
    return str(error)
