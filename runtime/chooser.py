"""Choosing the next tokens where the logits are, in the memory of a device: only they and what was
asked for of them are copied."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .constraint import MASK_BITS, mask_of
from .errors import ArtifactError
from .sampler import Limit, Report, Sample, Sampler, logit_error

# What a device is told of each row, int32; numbers that are none are the bits of float32: 1 /
# temperature, or 0 for the most probable token; 64 random bits. Then, where a limit is to be found,
# how many tokens are kept, or if 0, which share of the probability; and the least share of the
# best's.
OPTIONS = 6
SCALE, LOW, HIGH, COUNT, SHARE, LEAST = range(OPTIONS)
KEEP_ALL = 1 << 30  # tokens
REPORTED = 20  # most probable tokens of each row, at most; for more, its logits go to the host
MOST_CHANGES = 4096  # of logits in one call


def mask_words(vocab_size: int) -> int:
    return -(-vocab_size // MASK_BITS)


class LogitsDevice(Protocol):
    """What runs the functions of an artifact, in memory of its own."""

    def tensor(self, array: Any) -> Any:
        """What functions are bound to: of a numpy array, or of what one returned."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any: ...

    def write(self, array: Any, part: np.ndarray, start: int = 0) -> None:
        """Set elements along axis 0, from `start` on."""

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any: ...

    def numpy(self, result: Any) -> np.ndarray: ...


class Chooser:
    """The functions of an artifact that choose tokens, on its device, for `most_rows` at once; see
    `osscompile/importer/choice.py`. Never chosen are the `reserved` ids."""

    def __init__(
        self, device: LogitsDevice, vocab_size: int, reserved: NDArray[np.int64], most_rows: int
    ) -> None:
        self._device, self._vocab_size = device, vocab_size
        allowed = np.ones(vocab_size, np.bool_)
        allowed[reserved] = False
        self._allowed = mask_of(allowed)
        self._masks = device.zeros((most_rows + 1, self._allowed.size), "uint32")
        device.write(self._masks, self._allowed[None])  # the first, of rows without a constraint
        self._mask_tensor = device.tensor(self._masks)
        none = np.tile(np.array([-np.inf, 0], np.float32), (most_rows, 1))
        self._no_limits = device.tensor(none)
        self._bound: dict[str, list[Any]] = {}

    def choose(self, logits: Any, samplers: Sequence[Sampler]) -> list[Sample | ArtifactError]:
        """The next token for each of the first rows of what a step returned, whose logits are spent
        then; an error for a row whose logits are not numbers."""
        tensor, count = self._device.tensor(logits), int(logits.shape[0])
        mask_rows = self._write_masks(samplers, count)
        all_logits, told = self._report(logits, tensor, samplers, mask_rows)
        before = self._change(tensor, samplers)
        options = np.zeros((count, OPTIONS), np.int32)
        limits = self._limit(tensor, samplers, options, mask_rows)
        for i, sampler in enumerate(samplers):
            options[i, [SCALE, LOW, HIGH]] = sampler.draw_options()
        chosen = self._run("choose", [options, mask_rows], [tensor, self._mask_tensor, limits])
        chosen = self._device.numpy(chosen)
        reports = None if told is None else self._device.numpy(told)
        samples: list[Sample | ArtifactError] = []
        for i, sampler in enumerate(samplers):
            token, logit = int(chosen[i, 0]), float(chosen[i, 1])
            error = logit_error(logit if token >= 0 else -np.inf, token)
            if error is not None:
                samples.append(error)
                continue
            report = None
            if sampler.options.logprobs is not None:
                if sampler.options.logprobs > REPORTED:
                    report = sampler.report(all_logits[i])
                else:
                    assert reports is not None
                    report = _as_report(reports[i])
                logit = before.get(i * self._vocab_size + token, logit)
            samples.append(sampler.accept(token, logit, report))
        return samples

    def _write_masks(self, samplers: Sequence[Sampler], count: int) -> NDArray[np.int32]:
        """Which mask each row has."""
        mask_rows = np.zeros(count, np.int32)
        for i, sampler in enumerate(samplers):
            mask = sampler.mask()
            if mask is not None:
                allowed = np.zeros_like(self._allowed)
                allowed[: mask.size] = mask
                mask_rows[i] = i + 1
                self._device.write(self._masks, (allowed & self._allowed)[None], i + 1)
        return mask_rows

    def _report(
        self,
        logits: Any,
        tensor: Any,
        samplers: Sequence[Sampler],
        mask_rows: NDArray[np.int32],
    ) -> tuple[NDArray[np.float32], Any]:
        """The logits if any row needs them here, and what the device tells if any asks for it."""
        asked = [s.options.logprobs for s in samplers if s.options.logprobs is not None]
        all_logits = np.empty((0, 0), np.float32)
        if any(number > REPORTED for number in asked):
            all_logits = self._device.numpy(logits).copy()
        told = self._run("report", [mask_rows], [tensor, self._mask_tensor]) if asked else None
        return all_logits, told

    def _change(self, tensor: Any, samplers: Sequence[Sampler]) -> dict[int, float]:
        """Add biases and penalties; which logits were there before, by place, if any row tells
        them."""
        of_rows = [sampler.changes() for sampler in samplers]
        starts = np.arange(len(samplers)) * self._vocab_size
        places = np.concatenate(
            [ids + start for (ids, _), start in zip(of_rows, starts, strict=True)]
        )
        places = places.astype(np.int32)
        amounts = np.concatenate([amounts for _, amounts in of_rows]).view(np.int32)
        told = any(s.options.logprobs is not None for s in samplers)
        before: dict[int, float] = {}
        for start in range(0, places.size, MOST_CHANGES):
            some = slice(start, start + MOST_CHANGES)
            taken = self._run("change", [places[some], amounts[some]], [tensor])
            if told:
                numbers = self._device.numpy(taken)[:, 0].tolist()
                before |= dict(zip(places[some].tolist(), numbers, strict=True))
        return before

    def _limit(
        self,
        tensor: Any,
        samplers: Sequence[Sampler],
        options: NDArray[np.int32],
        mask_rows: NDArray[np.int32],
    ) -> Any:
        """The device's limits of what is drawn; `options` is scratch."""
        limits, all_of = self._no_limits, [sampler.limits() for sampler in samplers]
        for stage in range(max(map(len, all_of), default=0)):
            options[:, COUNT] = KEEP_ALL
            options[:, LEAST] = 0
            for i, (sampler, wanted) in enumerate(zip(samplers, all_of, strict=True)):
                options[i, SCALE] = sampler.scale_bits()
                if stage < len(wanted):
                    options[i, [COUNT, SHARE, LEAST]] = _limit_options(wanted[stage])
            bound = [tensor, self._mask_tensor, limits]
            limits = self._device.tensor(self._run("limit", [options, mask_rows], bound))
        return limits

    def _run(self, function: str, inputs: Sequence[np.ndarray], bound: list[Any]) -> Any:
        """Call a function. The same list is bound as long as the same arrays are: then what was
        prepared for it still holds."""
        kept = self._bound.get(function, [])
        if len(kept) != len(bound) or any(a is not b for a, b in zip(kept, bound, strict=True)):
            kept = self._bound[function] = bound
        return self._device.run(function, inputs, kept)


def _limit_options(limit: Limit) -> tuple[int, int, int]:
    share, least = np.array([limit.share, limit.least], np.float32).view(np.int32)
    return min(limit.count, KEEP_ALL), int(share), int(least)


def _as_report(told: NDArray[np.float32]) -> Report:
    """What `report` tells of a row: see `osscompile/kernels/report.py`."""
    best, total = told[:2].tolist()
    ids, logits = told[2::2], told[3::2]
    known = ids >= 0
    return Report.of(best, total, ids[known].astype(np.int64), logits[known])
