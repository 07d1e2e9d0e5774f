"""Measure a compiled model on a far machine, over TVM's RPC; its clock times the calls.

What only the machine itself knows (memory, load time, what else it did) is not in the report.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tqdm import tqdm
from tvm import relax

from .. import targets
from ..codegen.library import build_library
from ..errors import RemoteError
from ..options import path_option
from ..remote import Remote, is_alive, upload
from ..runtime.artifact import Artifact, open_artifact, read_manifest
from ..runtime.bench.artifact import artifact_facts, random_ids
from ..runtime.bench.models import DECODE_STEPS, REPEATS, WARMUP_STEPS, fitting, timing
from ..runtime.bench.report import BenchError, Report
from ..runtime.kv_cache import page_counts
from ..runtime.step import Part, step_inputs
from .bandwidth import PREFETCH_BYTES, read_module, shapes

SESSION_SECONDS = 24 * 3600  # then the server ends a session that was forgotten

Progress = Callable[[str], object]


def bench_far(
    artifact: str | Path,
    remote: Remote,
    prefill_lengths: Sequence[int],
    decode_depths: Sequence[int],
    progress: Progress,
) -> Report:
    """As `bench` of the runtime, of the best variant that works there. Raises ArtifactError,
    BenchError, TargetError or RemoteError."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = read_manifest(path_option("artifact", artifact))
    if not manifest.on_cpu:
        found = manifest.device or manifest.runtime
        raise BenchError(
            f"{artifact}: expected an artifact for a CPU, found one for {found}, which "
            "is not measured over TVM's RPC; run `osscompile bench` where its device is"
        )
    lengths, depths = fitting(artifact, manifest, prefill_lengths, decode_depths)
    reasons = []
    for name in (variant.name for variant in manifest.variants):
        opened = open_artifact(artifact, variant=name, elsewhere=True)
        session = remote.session(SESSION_SECONDS)
        try:
            model = _FarModel(session, opened)
            model.step([0], 0)
        except Exception as error:  # a CPU without the instructions ends the session
            if is_alive(session):
                raise
            reasons.append(f"{name} ended the session ({error!r})")
            continue
        return _measure(model, opened, remote, date, lengths, depths, progress)
    raise RemoteError(f"{remote}: expected a variant of {artifact} to run, found: {reasons}")


def _measure(
    model: "_FarModel",
    artifact: Artifact,
    remote: Remote,
    date: str,
    lengths: Sequence[int],
    depths: Sequence[int],
    progress: Progress,
) -> Report:
    manifest = artifact.manifest
    ids = random_ids(manifest)
    prefill, decode, bandwidth_at = {}, {}, {}
    for length in lengths:
        progress(f"prefill {length}")
        seconds = [model.prefill(ids[:length]) for _ in range(1 + REPEATS)]
        prefill[length] = timing(seconds[1:], None)
    progress("read bandwidth")
    reader = _FarReader(model, artifact)
    bandwidth = reader.best
    for depth in depths:
        progress(f"decode at {depth}")
        seconds, reads = [], []
        for i, token in enumerate(ids[depth : depth + WARMUP_STEPS + DECODE_STEPS]):
            reads.append(reader.bandwidth())
            seconds.append(model.step([token], depth + i))
        decode[depth] = timing(seconds[WARMUP_STEPS:], None)
        bandwidth_at[depth] = statistics.median(reads[WARMUP_STEPS:])
        bandwidth = max(bandwidth, *reads)
    return Report(
        **artifact_facts(manifest, artifact.variant.name),
        cpu=str(remote),
        cores=None,
        memory_bytes=None,
        date=date,
        other_processes=None,
        bandwidth=bandwidth,
        bandwidth_at=bandwidth_at,
        int8_peak=None,
        load_seconds=None,
        first_token_seconds=None,
        resident_bytes=None,
        peak_bytes=None,
        outside_share=None,
        prefill=prefill,
        decode=decode,
    )


class _FarModel:
    """An artifact's functions and tensors on the far machine; its KV cache holds zeros."""

    def __init__(self, session: Any, artifact: Artifact) -> None:
        self.session, self.device = session, session.cpu(0)
        self.chunk = artifact.manifest.chunk
        self._machine = relax.VirtualMachine(upload(session, artifact.library), self.device)
        manifest = artifact.manifest
        counts = page_counts(manifest, manifest.context)
        pages = (counts.full, counts.window)
        arrays = [np.arange(counts.full, dtype=np.int32) % count for count in pages]  # the tables
        for i, cache in enumerate(manifest.caches):
            count = pages[manifest.sliding[i // 2]]
            arrays.append(np.zeros((count, *cache.shape), cache.dtype))
        arrays += artifact.weights
        total = sum(array.nbytes for array in arrays)
        self._bound = []
        with tqdm(total=total, unit="B", unit_scale=True, desc="sending weights") as bar:
            for array in arrays:
                self._bound.append(self.tensor(np.asarray(array)))
                bar.update(array.nbytes)

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self.device)

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds of a whole prompt, from position 0."""
        starts = range(0, len(ids), self.chunk)
        return sum(self.step(ids[at : at + self.chunk], at) for at in starts)

    def step(self, ids: Sequence[int], position: int) -> float:
        """Seconds of one call."""
        function, arrays = step_inputs([Part(ids, position)])
        inputs = [self.tensor(array) for array in arrays]
        self._machine.set_input(function, *inputs, *self._bound)
        timer = self._machine.time_evaluator("invoke_stateful", self.device, number=1)
        seconds: float = timer(function).mean
        return seconds


class _FarReader:
    """`bandwidth.Reader`, there."""

    def __init__(self, model: _FarModel, artifact: Artifact) -> None:
        target = next(
            t
            for t in targets.load_variants(artifact.manifest.target)
            if t.variant == artifact.variant.name
        )
        data, sums = shapes()
        self._num_bytes = int(np.prod(data)) * 4
        self._device = model.device
        libraries = []
        with tempfile.TemporaryDirectory() as folder:
            for distance in PREFETCH_BYTES:
                file = Path(folder, f"read-{distance}-{target.library}")
                build_library(read_module(distance, *data[:2]), target, file)
                libraries.append(upload(model.session, file))
        empty = tvm.runtime.empty
        self._tensors = [empty(shape, "uint32", model.device) for shape in (data, sums)]
        libraries[0]["fill"](self._tensors[0])
        self.best, self._library = 0.0, libraries[0]
        for library in libraries:
            bandwidth = self._bandwidth(library)
            if bandwidth > self.best:
                self.best, self._library = bandwidth, library

    def bandwidth(self) -> float:
        return self._bandwidth(self._library)

    def _bandwidth(self, library: Any) -> float:
        timer = library.time_evaluator("read", self._device, number=1)
        return float(self._num_bytes / timer(*self._tensors).mean)
