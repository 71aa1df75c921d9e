"""One tree of exceptions: each class is a D-Bus error name, an exit status and a sentence.

The sentence is written where the fault is seen and printed unchanged at the edge: by the CLI on
stderr, by the service as the message of the D-Bus error. A second line `hint: …` says what to do.
"""

PREFIX = "org.lfsvc1.Error."


class LfsvcError(Exception):
    """Base of all errors that a person or a client is told about.

    `str(error)` is the first line (what is wrong), `error.hint` what to do about it, or "".
    """

    code = "Internal"
    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def dbus_name(self) -> str:
        """The name of this error on the bus."""
        return PREFIX + self.code

    @property
    def text(self) -> str:
        """Message and hint as they are printed and as they travel over D-Bus."""
        return f"{self}\nhint: {self.hint}" if self.hint else str(self)


class InvalidTask(LfsvcError):
    """The task does not follow the grammar, or names something that is not a regular, readable file."""

    code = "InvalidTask"
    exit_status = 2


class FileNotFound(LfsvcError):
    """The file of the task does not exist."""

    code = "FileNotFound"
    exit_status = 2


class InvalidConfig(LfsvcError):
    """The YAML of the task, or lfsvc's own config.yaml, cannot be used."""

    code = "InvalidConfig"
    exit_status = 2


class LlamaFactoryNotFound(LfsvcError):
    """`llamafactory-cli` is not on the PATH that jobs have."""

    code = "LlamaFactoryNotFound"


class InvalidOption(LfsvcError):
    """An option of SubmitWithOptions, or a key of a filter, is unknown or has the wrong type."""

    code = "InvalidOption"
    exit_status = 2


class NoSuchJob(LfsvcError):
    """No job has this id."""

    code = "NoSuchJob"


class NoRunningJob(LfsvcError):
    """Kill was called and nothing runs."""

    code = "NoRunningJob"


class JobEnded(LfsvcError):
    """The job has ended, so it can be neither killed nor cancelled."""

    code = "JobEnded"


class ShuttingDown(LfsvcError):
    """The service is stopping and takes nothing in."""

    code = "ShuttingDown"


class Internal(LfsvcError):
    """A fault of lfsvc itself or of the machine under it (a full disk, say)."""

    code = "Internal"


class NoService(LfsvcError):
    """The client reaches no service: no bus, or nothing that answers. Never on the bus."""

    code = "NoService"
    exit_status = 3


class WrongUse(LfsvcError):
    """The command line is wrong. Never on the bus."""

    code = "WrongUse"
    exit_status = 2


BY_DBUS_NAME: dict[str, type[LfsvcError]] = {
    PREFIX + cls.code: cls
    for cls in (
        InvalidTask,
        FileNotFound,
        InvalidConfig,
        LlamaFactoryNotFound,
        InvalidOption,
        NoSuchJob,
        NoRunningJob,
        JobEnded,
        ShuttingDown,
        Internal,
    )
}


def from_dbus(name: str, message: str) -> LfsvcError | None:
    """Make the error that the service sent again; None for a name that is not ours."""
    cls = BY_DBUS_NAME.get(name)
    if cls is None:
        return None
    text, _, hint = message.partition("\nhint: ")
    return cls(text, hint)
