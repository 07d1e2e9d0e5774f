"""logits -> next token: greedy or drawn from the truncated distribution, without sorting it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constraint import Constraint, is_allowed
from .errors import ArtifactError, InputError
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


@dataclass(frozen=True)
class Report:
    """What the model's own distribution is: what to subtract from a logit for its log-probability,
    and the most probable (id, logprob), best first."""

    log_total: float
    top: tuple[tuple[int, float], ...]

    @staticmethod
    def of(
        best: float, total: float, ids: NDArray[np.integer[Any]], logits: NDArray[np.float32]
    ) -> "Report":
        """Of the highest logit, the sum of e^(logit - it), and the most probable ids and logits."""
        log_total = best + math.log(total)
        pairs = zip(ids.tolist(), logits.tolist(), strict=True)
        return Report(log_total, tuple((id, logit - log_total) for id, logit in pairs))


@dataclass(frozen=True)
class Limit:
    """Which tokens are drawn: the `count` best, or if that is 0 the fewest best whose probabilities
    come to a `share` of all; of these, those with at least the `least` share of the best's."""

    count: int
    share: float
    least: float


class Sampler:
    """Chooses tokens for one answer. The same seed and logits give the same tokens, whatever is
    told of them and whichever other rows there are, on devices that choose themselves as well, but
    not the same as elsewhere.

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
    def error(self) -> InputError | None:
        """Why the last token is none, and the answer cannot go on: it was asked for in a form that
        cannot be followed."""
        error = None if self.constraint is None else self.constraint.error
        return None if error is None else InputError(f"response_format: {error}")

    def sample(self, logits: NDArray[np.float32]) -> Sample:
        """Choose from float32 [vocab] logits, which are not changed; -inf is never chosen.

        Raises ArtifactError when the logits hold NaN or no finite value.
        """
        scores = self._masked(logits)
        best = int(scores.argmax())  # the first NaN if there is one
        check_logit(float(scores[best]), best)
        report = self._report(scores, best) if self.options.logprobs is not None else None
        ids, amounts = self.changes()
        mask = self.mask()
        if ids.size or mask is not None:
            scores[ids] += amounts  # -inf stays what it is
            if mask is not None:
                scores[: logits.size][~is_allowed(mask, logits.size)] = -np.inf
            best = int(scores.argmax())
            check_logit(float(scores[best]), best)
        token = best if self._is_greedy() else self._draw(scores, scores[best])
        return self.accept(token, float(logits[token]), report)

    def report(self, logits: NDArray[np.float32]) -> Report:
        """What the model's own distribution is."""
        scores = self._masked(logits)
        return self._report(scores, int(scores.argmax()))

    def accept(self, token: int, logit: float, report: Report | None) -> Sample:
        """The sample of a token that was chosen, with its own logit; what comes after knows of it.
        Without a report nothing is told of its probability."""
        self._said[token] += 1
        if self.constraint is not None:
            self.constraint.push(token)
        if report is None:
            return Sample(token)
        return Sample(token, logit - report.log_total, report.top[: self.options.logprobs])

    def mask(self) -> NDArray[np.uint32] | None:
        """Which tokens may come next: see Constraint."""
        return None if self.constraint is None else self.constraint.mask()

    def changes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What is added to logits, biases less penalties: ids [n], each once, and amounts [n]."""
        options = self.options
        bias = options.logit_bias
        ids = np.fromiter(bias.keys(), np.int64, len(bias))
        amounts = np.fromiter(bias.values(), np.float64, len(bias))
        if options.frequency_penalty or options.presence_penalty:
            said = np.fromiter(self._said.keys(), np.int64, len(self._said))
            counts = np.fromiter(self._said.values(), np.float64, len(self._said))
            penalties = options.frequency_penalty * counts + options.presence_penalty
            parts = np.concatenate([amounts, -penalties])
            ids, places = np.unique(np.concatenate([ids, said]), return_inverse=True)
            amounts = np.zeros(ids.size)
            np.add.at(amounts, places, parts)
        return ids, amounts.astype(np.float32)

    def scale_bits(self) -> int:
        """The bits of the float32 1 / temperature, 0 for the most probable token."""
        if self._is_greedy():
            return 0
        return int(np.array(1 / self.options.temperature, np.float32).view(np.int32))

    def draw_options(self) -> tuple[int, int, int]:
        """How a device is to draw the next token: the scale, and 64 random bits, int32 each. What
        is random is the same whatever else is asked for."""
        scale = self.scale_bits()
        low, high = self._random.integers(-(1 << 31), 1 << 31, 2).tolist() if scale else (0, 0)
        return scale, low, high

    def limits(self) -> list[Limit]:
        """Which tokens a device is to draw from: one limit after the other."""
        options = self.options
        if self._is_greedy() or not (options.top_k or options.top_p < 1 or options.min_p > 0):
            return []
        if options.top_k and options.top_p < 1:
            by_count = Limit(options.top_k, 1.0, 0.0)
            return [by_count, Limit(0, options.top_p, options.min_p)]
        return [Limit(options.top_k, options.top_p, options.min_p)]

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

    def _report(self, scores: NDArray[np.float32], best: int) -> Report:
        weights = _exp_into(self._weights, scores, scores[best], 1.0)
        number = self.options.logprobs
        ids = _top_ids(scores, number) if number else np.empty(0, np.int64)
        total = float(weights.sum(dtype=np.float64))
        return Report.of(float(scores[best]), total, ids, scores[ids])

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


def sample_rows(
    logits: NDArray[np.float32], samplers: Sequence[Sampler]
) -> list[Sample | ArtifactError]:
    """Choose a token for each of the first rows of float32 [n, vocab] logits; an error for a row
    whose logits are not numbers."""
    samples: list[Sample | ArtifactError] = []
    for sampler, row in zip(samplers, logits, strict=False):
        try:
            samples.append(sampler.sample(row))
        except ArtifactError as error:
            samples.append(error)
    return samples


def check_logit(logit: float, token: int) -> None:
    """Raises ArtifactError unless the logit of the token that was chosen is finite."""
    error = logit_error(logit, token)
    if error is not None:
        raise error


def logit_error(logit: float, token: int) -> ArtifactError | None:
    """What is wrong with the logit of a token that was chosen."""
    if math.isfinite(logit):
        return None
    return ArtifactError(
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
