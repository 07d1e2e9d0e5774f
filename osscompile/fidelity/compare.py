"""Two models' logits after every token of a text -> how far they are apart."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.fidelity import Parting
from ..runtime.sampler import check_logit

NUM_PARTINGS = 5  # that are told

Logits = NDArray[np.float32]


def compare_logits(
    ids: Sequence[int],
    exact: Iterable[Logits],
    found: Iterable[Logits],
    spell: Callable[[int], str],
) -> dict[str, Any]:
    """The fields of a `Fidelity` that tell of the logits [vocab] after every id. `spell`: what a
    token is called. Raises ArtifactError for logits that are not finite."""
    divergences: list[float] = []
    partings: list[Parting] = []
    loss = exact_loss = 0.0
    following = [*ids[1:], None]
    for expected_row, row, token in zip(exact, found, following, strict=True):
        best, choice = int(expected_row.argmax()), int(row.argmax())
        check_logit(float(expected_row[best]), best)  # the first that is not a number, if any is
        check_logit(float(row[choice]), choice)
        expected, actual = _log_softmax(expected_row), _log_softmax(row)
        divergences.append(max(0.0, float(np.exp(expected) @ (expected - actual))))
        if best != choice:
            parting = Parting(len(divergences), spell(best), spell(choice), divergences[-1])
            partings.append(parting)
        if token is not None:
            loss -= float(actual[token])
            exact_loss -= float(expected[token])
    return {
        "tokens": len(ids),
        "mean_kl_divergence": float(np.mean(divergences)),
        "max_kl_divergence": max(divergences),
        "max_position": 1 + int(np.argmax(divergences)),
        "agreeing": len(ids) - len(partings),
        "loss": loss / (len(ids) - 1),
        "exact_loss": exact_loss / (len(ids) - 1),
        "partings": tuple(sorted(partings, key=lambda p: -p.kl_divergence)[:NUM_PARTINGS]),
    }


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
