"""Every error that FedChord raises on purpose.

    FedChordError                      exit code 1
    ├── InvalidInput (ValueError)      2   somebody gave us something wrong
    │   ├── InvalidSettings                a setting, variable or settings file
    │   ├── InvalidJobFile                 a field of a job file
    │   ├── InvalidTensors                 bytes that are not the safetensors they should be
    │   ├── TooLarge                       more than a limit allows
    │   ├── BrokenUpload                   an upload that ended early, or is not what it says
    │   └── InvalidMessage                 a message that cannot be read
    │       ├── UnknownVersion             written by a newer FedChord
    │       ├── UnknownKind                of a kind that this version does not know
    │       └── BadSignature               not signed by who it says
    ├── NotFound (LookupError)         3   no such job, site, model or blob
    ├── Conflict                       4   the thing is not in a state that allows this
    │   ├── NoUpstream                     a model store feeds no other, or several and none is named
    │   └── UpstreamCycle                  a model store's way up leads back to itself
    ├── AccessDenied (PermissionError) 4   the caller may not do this
    ├── Unavailable (ConnectionError)  5   a service, port or disk that we need is not there
    │   ├── BrokerUnavailable
    │   ├── StoreUnavailable
    │   ├── DatabaseUnavailable
    │   ├── UpstreamUnavailable            the upstream model store does not answer, or not sensibly
    │   ├── PortInUse
    │   └── DiskFull
    ├── UpdateRejected                 1   the gate's verdict on an update
    ├── Declined                       1   a site will not take part, and says why
    └── JobFailed                      6   a job that was waited for did not complete

The message of an error says what is wrong and what to do. `exit_code` is what the command line ends with.
"""

from typing import ClassVar


class FedChordError(Exception):
    """Something went wrong in FedChord; the log has more."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)

    @property
    def message(self) -> str:
        """The sentence for people."""
        return str(self.args[0])


class InvalidInput(FedChordError, ValueError):
    """The input is not valid; correct it and try again."""

    exit_code = 2


class InvalidSettings(InvalidInput):
    """A setting is not valid; correct the variable or the settings file."""


class InvalidJobFile(InvalidInput):
    """The job file is not valid; correct the field that is named."""


class InvalidTensors(InvalidInput):
    """The bytes are not valid safetensors; write them with FedChord or the safetensors library."""


class TooLarge(InvalidInput):
    """The input is larger than the limit; send less, or have the limit raised in the settings."""


class BrokenUpload(InvalidInput):
    """The upload is not whole; send it again."""


class InvalidMessage(InvalidInput):
    """The message cannot be read; check that sender and receiver run compatible versions."""


class UnknownVersion(InvalidMessage):
    """The message has a version that is not known here; upgrade this installation."""


class UnknownKind(InvalidMessage):
    """The message has a kind that is not known here; upgrade this installation."""


class BadSignature(InvalidMessage):
    """The message is not signed by its sender; check the public key that is enrolled for it."""


class NotFound(FedChordError, LookupError):
    """There is no such thing; list what there is and check the name."""

    exit_code = 3


class Conflict(FedChordError):
    """The state does not allow this; look at the state and decide again."""

    exit_code = 4


class NoUpstream(Conflict):
    """The model store has no upstream; add one with `fedchord store upstreams add`."""


class UpstreamCycle(Conflict):
    """The way up from the model store leads back to itself; correct or remove one of the upstreams."""


class AccessDenied(FedChordError, PermissionError):
    """The API key and secret do not allow this; ask the operator of the model store."""

    exit_code = 4


class Unavailable(FedChordError, ConnectionError):
    """A service that is needed does not answer; start it and try again."""

    exit_code = 5


class BrokerUnavailable(Unavailable):
    """The broker does not answer; start it or correct FEDCHORD_BROKER_URL."""


class StoreUnavailable(Unavailable):
    """The object store does not answer; start it or correct the FEDCHORD_S3_… settings."""


class DatabaseUnavailable(Unavailable):
    """The database does not answer; start it or correct FEDCHORD_DATABASE_URL."""


class UpstreamUnavailable(Unavailable):
    """The upstream model store does not answer as it should; check its URL and that it runs."""


class PortInUse(Unavailable):
    """The port is taken; free it or choose another one."""


class DiskFull(Unavailable):
    """The disk is full; free some space and try again."""


class UpdateRejected(FedChordError):
    """The update did not pass the gate."""


class Declined(FedChordError):
    """The site does not take part."""


class JobFailed(FedChordError):
    """The job did not complete; `fedchord jobs` shows the reason."""

    exit_code = 6
