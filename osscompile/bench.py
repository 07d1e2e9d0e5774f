"""Measure a compiled model on this machine, beside what the machine's memory allows.

Speeds are medians of repeated runs after a warm-up, with their spread. The roofline is measured in
the same run: reading the weights that one token needs takes bytes / bandwidth, and no decode that
reads each of them once can be faster.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .runtime.engine import Model, load

BANDWIDTH_BYTES = 1 << 30  # read from memory, far beyond the caches
REPEATS = 5
BUDGET_SECONDS = 60  # of one prefill length; two repeats are made whatever they take
PREFILL_LENGTHS = (16, 128, 512)
DECODE_DEPTHS = (0, 2048)
DECODE_STEPS = 16


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over repeats."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Report:
    """What one run measured, and on what. Speeds are tokens a second; keys are token counts."""

    model: str
    profile: str
    target: str
    compiler: str
    manifest_sha256: str
    machine: str
    cores: int
    load_before: float  # other processes: the 1-minute load average when the run began
    bandwidth: float  # bytes a second, reading on all cores
    bytes_per_token: int  # read from memory by one decode step without context
    load_seconds: float
    resident_bytes: int
    prefill: dict[int, Timing]
    decode: dict[int, Timing]

    @property
    def roofline(self) -> float:
        """Decode at depth 0 at the memory's speed, tokens a second."""
        return self.bandwidth / self.bytes_per_token

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def bench(
    artifact: str | Path,
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    decode_depths: Sequence[int] = DECODE_DEPTHS,
    progress: Callable[[str], object] = lambda stage: None,
) -> Report:
    """Measure prefill of some lengths and decode after some depths; `progress` hears the stage.

    Lengths that do not fit the artifact's context are left out. Raises ArtifactError.
    """
    busy = os.getloadavg()[0]
    progress("bandwidth")
    bandwidth = _read_bandwidth()
    start = time.perf_counter()
    model = load(artifact)
    load_seconds = time.perf_counter() - start
    ids = np.random.default_rng(0).integers(0, model.vocab_size, model.context).tolist()
    prefill, decode = {}, {}
    for length in prefill_lengths:
        if length <= model.context:
            progress(f"prefill {length}")
            prefill[length] = _time_prefill(model, ids[:length])
    for depth in decode_depths:
        if depth + DECODE_STEPS + 2 <= model.context:
            progress(f"decode at {depth}")
            decode[depth] = _time_decode(model, ids, depth)
    manifest = model.manifest
    return Report(
        model=manifest.model,
        profile=manifest.profile,
        target=manifest.target,
        compiler=manifest.compiler,
        manifest_sha256=json.loads(manifest.to_json())["manifest_sha256"],
        machine=_machine(),
        cores=os.cpu_count() or 1,
        load_before=busy,
        bandwidth=bandwidth,
        bytes_per_token=manifest.decode_bytes,
        load_seconds=load_seconds,
        resident_bytes=_resident_bytes(),
        prefill=prefill,
        decode=decode,
    )


def table(report: Report) -> list[tuple[str, str, str]]:
    """Rows of (what, speed, note) for people."""
    gigabytes = report.bytes_per_token / 1e9
    rows = [
        ("read bandwidth", f"{report.bandwidth / 1e9:.1f} GB/s", f"{report.cores} threads"),
        (
            "decode at memory speed",
            f"{report.roofline:.2f} tok/s",
            f"{gigabytes:.2f} GB a token",
        ),
        ("load", f"{report.load_seconds:.2f} s", ""),
        ("resident memory", f"{report.resident_bytes / 1e9:.2f} GB", ""),
    ]
    for length, timing in report.prefill.items():
        rows.append((f"prefill {length}", f"{length / timing.median:.2f} tok/s", _spread(timing)))
    for depth, timing in report.decode.items():
        share = 1 / timing.median / report.roofline
        note = f"{share:.0%} of memory speed; {_spread(timing)}"
        rows.append((f"decode at {depth}", f"{1 / timing.median:.2f} tok/s", note))
    return rows


def _time_prefill(model: Model, ids: list[int]) -> Timing:
    """A whole prompt, from an empty cache; the first time warms up."""
    seconds: list[float] = []
    while len(seconds) <= REPEATS and (len(seconds) <= 2 or sum(seconds) < BUDGET_SECONDS):
        model.forget()
        start = time.perf_counter()
        model.prefill(ids)
        seconds.append(time.perf_counter() - start)
    return _timing(seconds[1:])


def _time_decode(model: Model, ids: list[int], depth: int) -> Timing:
    """Single steps after `depth` tokens; the first two warm up."""
    model.forget()
    if depth:
        model.prefill(ids[:depth])
    seconds = []
    for token in ids[depth : depth + DECODE_STEPS + 2]:
        start = time.perf_counter()
        model.decode(token)
        seconds.append(time.perf_counter() - start)
    return _timing(seconds[2:])


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def _read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the best of some runs."""
    cores = os.cpu_count() or 1
    parts = np.ones((cores, BANDWIDTH_BYTES // cores // 8), np.uint64)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return parts.nbytes / best


def _spread(timing: Timing) -> str:
    return f"{timing.fastest * 1e3:.0f} to {timing.slowest * 1e3:.0f} ms"


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    return 0
