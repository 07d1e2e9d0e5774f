"""Measure compiled models on this machine, beside what the machine itself can do.

Speeds are medians of repeated runs, with their spread. The limits are measured in the same run: a
decode step reads its weights, keys and values once, and can be no faster than the memory is at that
time (`Report.roofline`); a prefill can do no more multiply-adds than the int8 peak.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bench_machine import (
    OtherProcesses,
    cpu_name,
    memory_bytes,
    process_bytes,
    source_commit,
    versions,
)
from .bench_report import FIRST_PROMPT, BenchError, Report, Timing
from .runtime.artifact import Manifest, open_artifact
from .runtime.device import Device
from .runtime.engine import Model, load
from .runtime.kv_cache import KEYS_PER_TILE
from .runtime.machine import physical_cores

if TYPE_CHECKING:
    from .bench_bandwidth import Reader

PREFILL_LENGTHS = (16, 128, 512, 2048, 4096)
DECODE_DEPTHS = (0, 2048, 16384)
REPEATS = 5  # of a prefill, after a warm-up
BUDGET_SECONDS = 60  # of one prefill length: none begins later, but for the least number of runs
SHORT = 512  # tokens: so long a prefill is run at least 3 times, a longer one once
DECODE_STEPS = 32
WARMUP_STEPS = 2
STREAMS = 64  # at most, to see DECODE_STEPS streamed steps: a stop id may end each early

Progress = Callable[[str], object]


def bench_each(
    artifacts: Sequence[str | Path],
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    decode_depths: Sequence[int] = DECODE_DEPTHS,
    progress: Progress | None = None,
) -> Iterator[Report]:
    """`bench` of one artifact after the other, each in a process of its own: the load is the first
    and the memory that of this artifact alone. `progress` must be picklable. Raises ArtifactError,
    or BenchError for one that does not run on the CPU, before the first is measured."""
    for path in artifacts:
        check_measurable(path, open_artifact(path).manifest)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for path in artifacts:
            yield pool.submit(bench, path, prefill_lengths, decode_depths, progress).result()


def bench(
    artifact: str | Path,
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    decode_depths: Sequence[int] = DECODE_DEPTHS,
    progress: Progress | None = None,
) -> Report:
    """Measure load, prefill of some lengths, decode after some depths, and the machine itself.

    Lengths and depths that do not fit the artifact's context are left out. `progress` hears what
    is measured next. Raises ArtifactError.
    """
    say = progress or (lambda stage: None)
    date, others = datetime.now(UTC).isoformat(timespec="seconds"), OtherProcesses()
    say("load")
    manifest = open_artifact(artifact).manifest  # hashes a new copy, which no later load does
    ids = random_ids(manifest)
    start = time.perf_counter()
    model = load(artifact)
    load_seconds = time.perf_counter() - start
    next(model.generate(ids[:FIRST_PROMPT], max_tokens=1))
    first_token_seconds = time.perf_counter() - start

    prefill = {}
    for length in prefill_lengths:
        if length <= model.context:
            say(f"prefill {length}")
            prefill[length] = _time_prefill(model, ids[:length])
    say("streaming")
    outside_share = _outside_share(model, ids)
    depths = [d for d in decode_depths if d + WARMUP_STEPS + DECODE_STEPS <= model.context]
    if depths:
        _fill_cache(model, ids[: max(depths)])
        model.decode(ids[max(depths)])
    resident, peak = process_bytes("VmRSS"), process_bytes("VmHWM")

    say("read bandwidth")
    from .bench_bandwidth import Reader  # imports the compiler: after memory was read

    reader = Reader()
    bandwidth = reader.num_bytes / reader.best_seconds
    decode, bandwidth_at = {}, {}
    for depth in depths:
        say(f"decode at {depth}")
        decode[depth], bandwidths = _time_decode(model, ids, depth, reader)
        bandwidth_at[depth] = statistics.median(bandwidths)
        bandwidth = max(bandwidth, *bandwidths)
    variant = model.variant
    del model, reader
    say("int8 peak")
    from .bench_int8 import int8_peak

    return Report(
        **artifact_facts(manifest, variant),
        cpu=cpu_name(),
        cores=physical_cores(),
        memory_bytes=memory_bytes(),
        date=date,
        bandwidth=bandwidth,
        bandwidth_at=bandwidth_at,
        int8_peak=int8_peak(),
        load_seconds=load_seconds,
        first_token_seconds=first_token_seconds,
        resident_bytes=resident,
        peak_bytes=peak,
        outside_share=outside_share,
        prefill=prefill,
        decode=decode,
        other_processes=others.share(),
    )


def artifact_facts(manifest: Manifest, variant: str) -> dict[str, Any]:
    """The fields of a `Report` that tell what was measured, whatever the machine."""
    from .bench_int8 import token_macs  # imports the compiler

    full_kv_bytes, sliding_kv_bytes = kv_bytes(manifest)
    return {
        "model": manifest.model,
        "profile": manifest.profile,
        "target": manifest.target,
        "variant": variant,
        "manifest_sha256": json.loads(manifest.to_json())["manifest_sha256"],
        "versions": versions(),
        "commit": source_commit(),
        "weight_bytes": manifest.decode_bytes,
        "token_macs": token_macs(manifest),
        "full_kv_bytes": full_kv_bytes,
        "sliding_kv_bytes": sliding_kv_bytes,
        "window": manifest.window,
    }


def check_measurable(path: str | Path, manifest: Manifest) -> None:
    """Raise BenchError for an artifact that does not run on a CPU."""
    if manifest.runtime != "tvm":
        raise BenchError(
            f"{path}: expected an artifact for a CPU, whose limits are measured beside it, found "
            f"one for {manifest.runtime}; time `osscompile run`"
        )


def kv_bytes(manifest: Manifest) -> tuple[int, int]:
    """Keys and values of one position: in all full layers, and in all sliding layers."""
    total = {False: 0, True: 0}
    pairs = zip(manifest.caches[0::2], manifest.caches[1::2], manifest.sliding, strict=True)
    for keys, values, sliding in pairs:
        capacity = values.shape[1]
        total[sliding] += (keys.num_bytes + values.num_bytes) // capacity
    return total[False], total[True]


def _time_prefill(model: Model, ids: list[int]) -> Timing:
    """A whole prompt, from an empty cache. The first of several runs warms up; where a single one
    took the budget, the shorter lengths before it did."""
    least = 3 if len(ids) <= SHORT else 1
    seconds: list[float] = []
    others = OtherProcesses()
    while len(seconds) < least or (len(seconds) <= REPEATS and sum(seconds) < BUDGET_SECONDS):
        model.forget()
        start = time.perf_counter()
        model.prefill(ids)
        seconds.append(time.perf_counter() - start)
    return timing(seconds[1:] or seconds, others)


def _time_decode(
    model: Model, ids: list[int], depth: int, reader: "Reader"
) -> tuple[Timing, list[float]]:
    """Single steps after `depth` tokens, without sampling; and bytes a second that `reader` read
    between them."""
    _fill_cache(model, ids[:depth])
    seconds, bandwidths = [], []
    others = OtherProcesses()
    for token in ids[depth : depth + WARMUP_STEPS + DECODE_STEPS]:
        bandwidths.append(reader.num_bytes / reader.seconds())
        start = time.perf_counter()
        model.decode(token)
        seconds.append(time.perf_counter() - start)
    return timing(seconds[WARMUP_STEPS:], others), bandwidths[WARMUP_STEPS:]


def _fill_cache(model: Model, ids: list[int]) -> None:
    """As if `ids` went before, with random keys and values: a step takes as long whatever they
    are, and to compute those of 16,384 tokens takes minutes."""
    model.forget()
    cache, rng = model._cache, np.random.default_rng(0)
    cache.begin(len(ids))
    for keys, values in zip(cache.arrays[0::2], cache.arrays[1::2], strict=True):
        for part in (keys[:, : -(-len(ids) // KEYS_PER_TILE)], values[:, : len(ids)]):
            part[...] = rng.standard_normal(part.shape, np.float32)
    cache.append(ids)


def _outside_share(model: Model, ids: list[int]) -> float | None:
    """Share of a step of `generate` that passes outside the compiled function, where Python samples
    and makes text. None if the context, or a stop id each time, leaves no second token."""
    assert isinstance(model._device, Device)  # as `bench_each` checked
    model.forget()
    shares: list[float] = []
    with _inside(model._device) as inside:
        for token in ids[:STREAMS]:
            stream = model.generate([token], max_tokens=1 + DECODE_STEPS - len(shares))
            next(stream)
            start = time.perf_counter()
            for _ in stream:
                now = time.perf_counter()
                shares.append(1 - inside[-1] / (now - start))
                start = now
            if len(shares) >= DECODE_STEPS:
                break
    return statistics.median(shares) if shares else None


@contextmanager
def _inside(device: Device) -> Iterator[list[float]]:
    """Seconds of every call of a compiled function, in a list that grows."""
    seconds: list[float] = []
    run = device.run

    def timed(*arguments: Any) -> np.ndarray:
        start = time.perf_counter()
        result = run(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    vars(device)["run"] = timed  # hides the method
    try:
        yield seconds
    finally:
        del vars(device)["run"]


def random_ids(manifest: Manifest) -> list[int]:
    """As many tokens as the context has positions."""
    ids: list[int] = (
        np.random.default_rng(0).integers(manifest.vocab_size, size=manifest.context).tolist()
    )
    return ids


def timing(seconds: list[float], others: OtherProcesses | None) -> Timing:
    return Timing(
        median=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        runs=len(seconds),
        other_processes=others.share() if others is not None else None,
    )
