"""Errors that users see. Each message says what was expected, what was found and what to do."""


class OsscompileError(Exception):
    """Base of every error that osscompile raises on purpose."""


class ArtifactError(OsscompileError):
    """A compiled artifact cannot be used: damaged, of another version, or for another machine."""


class InputError(OsscompileError, ValueError):
    """A request to a loaded model cannot be served: its prompt, options or messages are wrong."""


class TuningError(OsscompileError):
    """A folder of candidates cannot be measured or used: damaged, or made for another machine."""


class DefaultError(TuningError):
    """The candidate with the default constants fails: its kernel cannot be tuned, others can."""
