"""Errors that users see. Each message says what was expected, what was found and what to do."""

MOST_SHOWN = 300  # characters of a name


def printable(text: str) -> str:
    """The lines of a text without what a terminal would obey, or cannot show."""
    lines = text.expandtabs().split("\n")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def shown(name: object, most: int = MOST_SHOWN) -> str:
    """What a user or a file gave, cut and made fit for one line of a message."""
    return printable(str(name)[:most].replace("\n", "?").replace("\t", "?"))


class OsscompileError(Exception):
    """Base of every error that osscompile raises on purpose. Messages quote names that users and
    files give: whatever those are, a message can be printed."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ArtifactError(OsscompileError):
    """A compiled artifact cannot be used: damaged, of another version, or for another machine."""


class InputError(OsscompileError, ValueError):
    """A request to a loaded model cannot be served: its prompt, options or messages are wrong."""


class TuningError(OsscompileError):
    """A folder of candidates cannot be measured or used: damaged, or made for another machine."""


class DefaultError(TuningError):
    """The candidate with the default constants fails: its kernel cannot be tuned, others can."""
