"""The functions of an artifact on its device, and the KV cache that they extend.

All of it is used on the driver's thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .artifact import Artifact
from .chooser import Chooser
from .devices.driver import driver, forbid_fork
from .devices.launch_devices import LAUNCH_DEVICES, LaunchDevice
from .devices.program import read_programs
from .devices.tvm_cpu import Device
from .devices.tvm_device import TensorDevice
from .errors import ArtifactError
from .kv_cache import CachedSequence, KVCache, page_counts
from .memory import PROCESS_BYTES, memory_bytes
from .sampler import Sample, Sampler, sample_rows
from .step import Part, step_inputs


@dataclass(frozen=True)
class Rows:
    """Tokens that a step appends to a sequence, and of how many of the last ones the logits are
    wanted."""

    sequence: CachedSequence
    ids: Sequence[int]
    wanted: int = 1


class Runner:
    """`sequences`: how many run at once; `reserved`: ids that are never chosen; others as
    for `load`."""

    def __init__(
        self,
        artifact: Artifact,
        context: int,
        kv_memory: int | None,
        threads: int,
        sequences: int,
        reserved: np.ndarray,
    ) -> None:
        manifest = artifact.manifest
        needed = sum(memory_bytes(manifest, context, kv_memory, sequences).values())
        self._driver = driver()
        self.device = _open_device(artifact, threads, needed - PROCESS_BYTES)
        limit = self.device.array_limit
        counts = page_counts(manifest, context, kv_memory, limit, sequences)
        # a batch of a model, and its own sequence, may be more: as many as one step tells of
        self.cache = KVCache(manifest, self.device, counts, 1 + manifest.most_wanted)
        self._bound: list[Any] = []
        for array in (*self.cache.tables, *self.cache.arrays, *artifact.weights):
            self._driver.check()
            self._bound.append(self.device.tensor(array))
        self.chooser: Chooser | None = None  # where the logits are in the host's memory
        if not isinstance(self.device, Device):
            most = manifest.most_wanted
            self.chooser = Chooser(self.device, manifest.vocab_size, reserved, most)

    def step(self, rows: Sequence[Rows]) -> Any:
        """Append tokens -> the device's logits, of which the first are those of the wanted rows, in
        order. Raises NoPages."""
        self._driver.check()
        parts = []
        for some in rows:
            start = some.sequence.begin(len(some.ids))
            parts.append(Part(some.ids, start, some.sequence.table, some.wanted))
        logits = self.device.run(*step_inputs(parts), self._bound)
        for some in rows:
            some.sequence.append(some.ids)
        return logits

    def sample(self, logits: Any, samplers: Sequence[Sampler]) -> list[Sample | ArtifactError]:
        """A token for each of the first rows of logits, which are spent then: chosen by the device
        where they are; an error for a row whose logits are not numbers. Raises ArtifactError for a
        device that cannot do it."""
        if self.chooser is not None:
            return self.chooser.choose(logits, samplers)
        return sample_rows(self.device.numpy(logits), samplers)


def _open_device(
    artifact: Artifact, threads: int, needed_bytes: int
) -> Device | TensorDevice | LaunchDevice:
    manifest, library = artifact.manifest, artifact.library
    sha256 = manifest.files[library.name].sha256
    if manifest.on_cpu:
        return Device(library, threads, sha256)
    forbid_fork()
    launching = LAUNCH_DEVICES.get(manifest.runtime)
    if launching is not None:
        return launching(library, read_programs(artifact), sha256=sha256)
    return TensorDevice(library, manifest.device, threads, needed_bytes, sha256)
