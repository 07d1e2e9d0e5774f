"""Choosing the next token where the logits are, in the memory of a device: only it and its logit
are copied."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class LogitsDevice(Protocol):
    """What runs the functions of an artifact, in memory of its own."""

    def tensor(self, array: Any) -> Any:
        """What functions are bound to: of a numpy array, or of what one returned."""

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any: ...

    def numpy(self, result: Any) -> np.ndarray: ...


class Chooser:
    """The function `choose` of an artifact, on its device; see `kernels/choose.py`. Never chosen
    are the `reserved` ids."""

    def __init__(self, device: LogitsDevice, vocab_size: int, reserved: NDArray[np.int64]) -> None:
        mask = np.zeros(vocab_size, np.float32)
        mask[reserved] = -np.inf
        self._device, self._mask = device, device.tensor(mask)
        self._bound: list[Any] = []

    def choose(self, logits: Any, options: NDArray[np.int32]) -> tuple[int, float]:
        """The next token and its logit, of what `prefill` or `decode` returned."""
        tensor = self._device.tensor(logits)
        if not (self._bound and self._bound[0] is tensor):  # else what was prepared still holds
            self._bound = [tensor, self._mask]
        chosen = self._device.numpy(self._device.run("choose", [options], self._bound))
        ((token, logit),) = chosen.tolist()
        return int(token), logit
