"""logits -> next token: greedy or drawn from the truncated distribution, without sorting it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constraint import Constraint, is_allowed
from .errors import ArtifactError, OsscompileError
from .sampling_options import SamplingOptions

GREEDY_BELOW = 1e-5  # a lower temperature is greedy: dividing logits by it could overflow
BLOCK = 128  # logits per block of the two-level searches: about sqrt(vocabulary)


@dataclass(frozen=True)
class Sample:
    """A chosen token.

    logprob is its natural log-probability in the model's own distribution: softmax of the logits
    without the reserved ids, before bias, penalties, constraint, temperature, top_k, top_p and
    min_p.
    top_logprobs are the most probable (id, logprob) of the same distribution, best first, as many
    as SamplingOptions.logprobs says; where it is None, so is logprob.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens for one answer. The same seed and logits give the same tokens, on devices that
    choose themselves as well, but not the same as elsewhere.

    reserved: integer [n], the ids that are never chosen (see reserved_ids). They are left out of
    every normalisation. constraint: what else is not chosen; it is told what is.
    """

    def __init__(
        self,
        options: SamplingOptions,
        reserved: NDArray[np.integer[Any]],
        constraint: Constraint | None = None,
    ) -> None:
        self.options, self.constraint = options, constraint
        self._reserved = np.asarray(reserved, dtype=np.int64)
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._said: Counter[int] = Counter()  # for penalties
        self._scores = np.empty(0, np.float32)  # both are scratch, [vocab up to a whole block]
        self._weights = np.empty(0, np.float32)

    @property
    def error(self) -> OsscompileError | None:
        """Why the last token is none, and the answer cannot go on."""
        return None if self.constraint is None else self.constraint.error

    def sample(self, logits: NDArray[np.float32]) -> Sample:
        """Choose from float32 [vocab] logits, which are not changed; -inf is never chosen.

        Raises ArtifactError when the logits hold NaN or no finite value.
        """
        scores = self._masked(logits)
        best = int(scores.argmax())  # the first NaN if there is one
        check_logit(float(scores[best]), best)
        reported = self.options.logprobs
        log_total, top = (
            self._normalise(scores, best, reported) if reported is not None else (0, ())
        )
        mask = None if self.constraint is None else self.constraint.mask()
        if self.options.changes_logits or mask is not None:
            self._change(scores)
            if mask is not None:
                scores[: logits.size][~is_allowed(mask, logits.size)] = -np.inf
            best = int(scores.argmax())
        token = best if self._is_greedy() else self._draw(scores, scores[best])
        self._said[token] += 1
        if self.constraint is not None:
            self.constraint.push(token)
        if reported is None:
            return Sample(token)
        return Sample(token, float(logits[token]) - log_total, top)

    def device_options(self) -> NDArray[np.int32] | None:
        """How a device is to choose the next token: int32 [3], see `kernels/choose.py`; None for
        what it cannot: `sample` does."""
        options = self.options
        if options.logprobs is not None or options.changes_logits or self.constraint is not None:
            return None
        if self._is_greedy():
            return np.zeros(3, np.int32)
        if options.top_k or options.top_p < 1 or options.min_p > 0:
            return None
        scale = np.array([1 / options.temperature], np.float32).view(np.int32)
        seed = self._random.integers(-(1 << 31), 1 << 31, 2).astype(np.int32)
        return np.concatenate([scale, seed])

    def _is_greedy(self) -> bool:
        return self.options.temperature < GREEDY_BELOW or self.options.top_k == 1

    def _masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        assert logits.ndim == 1, logits.shape
        padded = -(-logits.size // BLOCK) * BLOCK
        if self._scores.size != padded:
            self._scores = np.empty(padded, np.float32)
            self._weights = np.empty(padded, np.float32)
        self._scores[: logits.size] = logits
        self._scores[logits.size :] = -np.inf
        self._scores[self._reserved] = -np.inf
        return self._scores

    def _normalise(
        self, scores: NDArray[np.float32], best: int, num_top: int
    ) -> tuple[float, tuple[tuple[int, float], ...]]:
        """What to subtract from a logit for its log-probability, and the most probable tokens."""
        weights = _exp_into(self._weights, scores, scores[best], 1.0)
        log_total = float(scores[best]) + math.log(weights.sum(dtype=np.float64))
        ids = _top_ids(scores, num_top).tolist() if num_top else []
        return log_total, tuple((id, float(scores[id]) - log_total) for id in ids)

    def _change(self, scores: NDArray[np.float32]) -> None:
        """Add the bias, subtract the penalties; -inf stays what it is."""
        options = self.options
        for id, bias in options.logit_bias.items():
            scores[id] += bias
        said = np.fromiter(self._said.keys(), np.int64)
        counts = np.fromiter(self._said.values(), np.float32)
        scores[said] -= options.frequency_penalty * counts + options.presence_penalty

    def _draw(self, scores: NDArray[np.float32], best: np.float32) -> int:
        """Narrow the ids down as cheaply as the options allow, then draw from what is left."""
        options, temperature = self.options, self.options.temperature
        if options.top_k > 0:
            ids = _top_ids(scores, options.top_k)
            weights = _exp_into(np.empty(ids.size, np.float32), scores[ids], best, temperature)
            if options.top_p < 1:
                sums = weights.cumsum(dtype=np.float64)
                ids = ids[: np.searchsorted(sums, options.top_p * sums[-1]) + 1]
                weights = weights[: ids.size]
        elif options.top_p < 1:
            weights = _exp_into(self._weights, scores, best, temperature)
            ids = _nucleus(weights, options.top_p)
            weights = weights[ids]
        elif options.min_p > 0:
            # A little too many, so that rounding loses none: the exact limit follows below.
            limit = float(best) + temperature * (math.log(options.min_p) - 1e-3)
            ids = np.flatnonzero(scores >= limit - 1e-6 * abs(limit))
            weights = _exp_into(np.empty(ids.size, np.float32), scores[ids], best, temperature)
        else:
            return self._draw_from_all(_exp_into(self._weights, scores, best, temperature))
        kept = weights >= np.float32(options.min_p)  # the best token has weight 1
        ids, weights = ids[kept], weights[kept]
        return int(ids[_pick(weights, self._random.random() * weights.sum(dtype=np.float64))])

    def _draw_from_all(self, weights: NDArray[np.float32]) -> int:
        """First the block, then the token in it: the running sum of all would cost more."""
        blocks = weights.reshape(-1, BLOCK)
        block_sums = blocks.sum(axis=1)
        target = self._random.random() * block_sums.sum(dtype=np.float64)
        block = _pick(block_sums, target)
        within = target - block_sums[:block].sum(dtype=np.float64)
        return block * BLOCK + _pick(blocks[block], max(within, 0.0))


def check_logit(logit: float, token: int) -> None:
    """Raises ArtifactError unless the logit of the token that was chosen is finite."""
    if not math.isfinite(logit):
        raise ArtifactError(
            f"logits: expected finite numbers, found {logit} at token {token}; "
            "are the weights damaged, or compiled for another machine?"
        )


def reserved_ids(
    specials: dict[str, int], vocab_size: int, table_size: int | None = None
) -> NDArray[np.int64]:
    """int64 [n], ascending: the ids that a model must not say.

    These are the special tokens without a use in an answer (<|reserved_N|>, <|startoftext|>,
    <|endofprompt|>) and the rows of the vocabulary beyond the tokenizer's table. vocab_size is
    the number of logits, table_size the number of ids in the table (Tokenizer.vocab_size);
    without it the table ends with the last special token, as it does in o200k_harmony.
    """
    if table_size is None:
        table_size = max(specials.values()) + 1
    unsaid = [
        id
        for name, id in specials.items()
        if name.startswith("<|reserved_") or name in ("<|startoftext|>", "<|endofprompt|>")
    ]
    ids = {*unsaid, *range(table_size, vocab_size)}
    return np.array(sorted(id for id in ids if id < vocab_size), dtype=np.int64)


def _exp_into(
    out: NDArray[np.float32],
    scores: NDArray[np.float32],
    best: np.float32,
    temperature: float,
) -> NDArray[np.float32]:
    """exp((scores - best) / temperature), not normalised: the best token has weight 1."""
    with np.errstate(over="ignore"):  # to -inf, a weight of 0
        np.subtract(scores, best, out=out)
        if temperature != 1:
            np.divide(out, np.float32(temperature), out=out)
    return np.exp(out, out=out)


def _top_ids(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The ids of the k highest scores above -inf, best first, the lowest id first among equals."""
    block_best = scores.reshape(-1, BLOCK).max(axis=1)
    if k <= block_best.size:
        # k blocks have a best score at or above the k-th highest of them, so k scores do.
        least = np.partition(block_best, -k)[-k]
    else:
        least = np.partition(scores, -min(k, scores.size))[-min(k, scores.size)]
    ids = np.flatnonzero(scores >= least)
    ids = ids[np.argsort(-scores[ids], kind="stable")[:k]]
    return ids[scores[ids] > -np.inf]


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """The fewest ids with the largest weights whose sum is at least top_p of the total, ascending.

    The lowest ids come first among equal weights. Weights are sorted without their ids, which
    is several times faster, and only those that can matter.
    """
    total = float(weights.sum(dtype=np.float64))
    # All weights below this one together are less than what top_p leaves out.
    negligible = np.float32((1 - top_p) * total / weights.size)
    descending = np.sort(weights[weights >= negligible])[::-1]
    sums = descending.cumsum(dtype=np.float64)
    count = min(int(np.searchsorted(sums, top_p * total)) + 1, descending.size)
    least = descending[count - 1]
    ids = np.flatnonzero(weights >= least)
    if ids.size > count:
        equal = np.flatnonzero(weights[ids] == least)
        ids = np.delete(ids, equal[count - ids.size :])
    return ids


def _pick(weights: NDArray[np.float32], target: float) -> int:
    """The first index at which the running sum of the weights passes target (0 <= target)."""
    sums = weights.cumsum(dtype=np.float64)
    return int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0)), side="right"))
