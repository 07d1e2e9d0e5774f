"""How near an artifact is to its checkpoint, as was measured: a file of its own in the artifact.

`osscompile measure-fidelity` writes it, `inspect` prints it, and loading ignores it.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import OsscompileError
from .fields import FieldError, parse_fields, read_small

FIDELITY = "fidelity.json"
PARTIAL = "fidelity.json.partial"  # until all of it is written
MAX_BYTES = 64 << 10  # ten times what one has
MAX_LOSS = 700  # nats; of more, the perplexity is no float64


class FidelityError(OsscompileError):
    """An artifact cannot be compared with a model, or the file of a comparison is damaged."""


@dataclass(frozen=True)
class Parting:
    """A token that the artifact would choose differently; texts in quotes, or ids."""

    position: int
    exact: str
    artifact: str
    kl_divergence: float


@dataclass(frozen=True)
class Fidelity:
    """An artifact beside the checkpoint in the exact kernels of a CPU, after every token of a text.

    Divergences are of the exact distribution to the artifact's, in nats; losses the mean of
    -log p of the token that follows, in nats.
    """

    manifest_sha256: str  # of the artifact that was measured
    variant: str  # its library that ran
    compiler: str  # version of osscompile that measured
    date: str  # ISO 8601
    model: str  # compared with
    text: str  # what it is
    tokens: int
    mean_kl_divergence: float
    max_kl_divergence: float
    max_position: int  # of the token before which that is
    agreeing: int  # tokens after which both find the same one most probable
    loss: float
    exact_loss: float
    partings: tuple[Parting, ...]  # of those after which they do not, the largest divergences


def read_fidelity(artifact: Path) -> Fidelity | None:
    """What was measured of an artifact, if anything was. Raises FidelityError for a file that is
    damaged: nobody vouches for it."""
    file = artifact / FIDELITY
    try:
        contents = json.loads(read_small(file, MAX_BYTES))
        fidelity: Fidelity = parse_fields(Fidelity, contents, "the measurement")
        if not 0 < fidelity.tokens >= fidelity.agreeing:
            raise ValueError(f"{fidelity.agreeing} of {fidelity.tokens} tokens that agree")
        return fidelity
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, FieldError) as error:
        raise FidelityError(
            f"{file}: expected what `osscompile measure-fidelity` wrote, found other contents: "
            f"{error}; measure again"
        ) from error


def write_fidelity(artifact: Path, fidelity: Fidelity) -> None:
    """All of it or nothing. Raises FidelityError where the artifact cannot be written."""
    partial = artifact / PARTIAL
    try:
        try:
            partial.write_text(json.dumps(asdict(fidelity), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, artifact / FIDELITY)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(artifact, error) from error


def check_writable(artifact: Path) -> None:
    """Raise FidelityError now rather than after the measuring."""
    try:
        (artifact / PARTIAL).touch()
        (artifact / PARTIAL).unlink()
    except OSError as error:
        raise _not_writable(artifact, error) from error


def fidelity_rows(fidelity: Fidelity) -> list[tuple[str, str]]:
    """A table for people."""
    share = 100 * fidelity.agreeing / fidelity.tokens
    perplexity, exact = map(_perplexity, (fidelity.loss, fidelity.exact_loss))
    rows = [
        ("compared with", f"{fidelity.model}, in exact kernels"),
        ("measured", f"{fidelity.date}, {fidelity.variant}, osscompile {fidelity.compiler}"),
        ("on", f"{fidelity.tokens:,} tokens of {fidelity.text}"),
        (
            "KL divergence",
            f"{fidelity.mean_kl_divergence:.2e} nats in the mean, "
            f"{fidelity.max_kl_divergence:.2e} at most, at position {fidelity.max_position}",
        ),
        ("top-1 agreement", f"{share:.2f} %, {fidelity.agreeing:,} tokens"),
        ("perplexity", f"{perplexity}, exact {exact}"),
    ]
    rows += [
        (
            f"at position {parting.position}",
            f"{parting.artifact}, exact {parting.exact}; KL {parting.kl_divergence:.2e}",
        )
        for parting in fidelity.partings
    ]
    return rows


def _not_writable(folder: Path, error: OSError) -> FidelityError:
    return FidelityError(
        f"{folder}: expected a folder that can be written, found: {error.strerror}; measure a copy "
        "of the artifact"
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.4g}" if loss < MAX_LOSS else "above 1e304"
