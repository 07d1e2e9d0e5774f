"""Measure compiled models on this machine, or a device of it, beside what that itself can do.

Speeds are medians of repeated runs, with their spread. The limits are measured in the same run: a
decode step reads its weights, keys and values once, and can be no faster than the memory is at that
time (`Report.roofline`); a prefill can do no more multiply-adds than the int8 peak, which is known
of CPUs only. Steps and prefills are timed by the host's clock, until it has their token or logits.
Reading the memory of a CPU, or of a device of TVM's runtime, takes kernels compiled for it: who has
a compiler gives `Limits`; without them those figures are left out of the report.
"""

import multiprocessing
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artifact import open_artifact
from ..devices.launch_devices import LaunchDevice
from ..devices.tvm_cpu import Device
from ..devices.tvm_device import TensorDevice
from ..errors import ArtifactError
from ..kv_cache import CachedSequence
from ..machine import physical_cores
from ..manifest import Manifest
from ..model import Model, open_model
from ..runner import Rows
from ..sampler import Sampler
from ..sampling_options import SamplingOptions
from .artifact import artifact_facts, random_ids, step_bytes
from .bandwidth_device import DeviceReader
from .machine import OtherProcesses, cpu_name, gpu_name, memory_bytes, process_bytes, system_name
from .report import FIRST_PROMPT, BenchError, Report, Timing

PREFILL_LENGTHS = (16, 128, 512, 2048, 4096)
DECODE_DEPTHS = (0, 2048, 16384)
REPEATS = 5  # of a prefill, after a warm-up
BUDGET_SECONDS = 60  # of one prefill length: none begins later, but for the least number of runs
SHORT = 512  # tokens: so long a prefill is run at least 3 times, a longer one once
DECODE_STEPS = 32
WARMUP_STEPS = 2
SEQUENCE_DEPTH = 128  # tokens before, of each of several sequences
STREAMS = 64  # at most, to see DECODE_STEPS streamed steps: a stop id may end each early

Progress = Callable[[str], object]


class Reader(Protocol):
    """Reads `num_bytes` of memory a call."""

    num_bytes: int
    best_seconds: float

    def seconds(self) -> float: ...


@dataclass(frozen=True)
class Limits:
    """What takes a compiler to measure. Both can be pickled, and import it only when called."""

    open_reader: Callable[[Model], Reader]  # of the memory that the model's kernels read
    int8_peak: Callable[[], float | None]  # of this CPU, in multiply-adds a second


def bench_each(
    artifacts: Sequence[str | Path],
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    decode_depths: Sequence[int] = DECODE_DEPTHS,
    progress: Progress | None = None,
    limits: Limits | None = None,
    sequences: Sequence[int] = (),
) -> Iterator[Report]:
    """`bench` of one artifact after the other, each in a process of its own: the load is the first
    and the memory that of this artifact alone. `progress` must be picklable. Raises ArtifactError
    before the first is measured, OsscompileError for one whose device is not here."""
    sizes = [
        fitting(path, open_artifact(path).manifest, prefill_lengths, decode_depths)
        for path in artifacts
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, max_tasks_per_child=1, initializer=_ignore_interrupts
    ) as pool:
        for path, (lengths, depths) in zip(artifacts, sizes, strict=True):
            measured = pool.submit(bench, path, lengths, depths, progress, limits, sequences)
            try:
                yield measured.result()
            except BrokenProcessPool as error:
                raise BenchError(
                    f"{path}: expected the process that measures it to report, found that the "
                    "system ended it; is there memory for the model?"
                ) from error
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.kill()  # it would go on for minutes
                raise


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of a terminal: ours ends those that it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def bench(
    artifact: str | Path,
    prefill_lengths: Sequence[int] = PREFILL_LENGTHS,
    decode_depths: Sequence[int] = DECODE_DEPTHS,
    progress: Progress | None = None,
    limits: Limits | None = None,
    sequences: Sequence[int] = (),
) -> Report:
    """Measure load, prefill of some lengths, decode after some depths, and the machine itself;
    and steps of several `sequences` together.

    Lengths and depths that do not fit the artifact's context are left out, with a warning.
    `progress` hears what is measured next. Raises ArtifactError, OsscompileError without the device
    or its memory.
    """
    say = progress or (lambda stage: None)
    date, others = datetime.now(UTC).isoformat(timespec="seconds"), OtherProcesses()
    say("load")
    manifest = open_artifact(artifact).manifest  # hashes a new copy, which no later load does
    lengths, depths = fitting(artifact, manifest, prefill_lengths, decode_depths)
    ids = random_ids(manifest)
    start = time.perf_counter()
    model = open_model(artifact, sequences=max(sequences, default=1))
    load_seconds = time.perf_counter() - start
    next(model.generate(ids[:FIRST_PROMPT], max_tokens=1, temperature=0))
    first_token_seconds = time.perf_counter() - start

    prefill = {}
    for length in lengths:
        say(f"prefill {length}")
        prefill[length] = _time_prefill(model, ids[:length])
    say("streaming")
    outside_share = _outside_share(model, ids)
    deepest = max(depths, default=0)
    _fill_cache(model, ids[:deepest])
    resident, peak = process_bytes("VmRSS"), process_bytes("VmHWM")
    device, device_bytes = _device_facts(model)

    say("read bandwidth")
    reader = model._driver.call(partial(_open_reader, model, limits))
    bandwidth = reader.num_bytes / reader.best_seconds if reader is not None else None
    decode, bandwidth_at = {}, {}
    for depth in sorted(depths, reverse=True):
        say(f"decode at {depth}")
        if depth < deepest:
            _fill_cache(model, ids[:depth])
        steps = ids[depth : depth + WARMUP_STEPS + DECODE_STEPS]
        decode[depth], bandwidths = _time_decode(model, steps, reader)
        if bandwidth is not None:
            bandwidth_at[depth] = statistics.median(bandwidths)
            bandwidth = max(bandwidth, *bandwidths)
    together, together_bandwidth = {}, {}
    for count in sequences:
        say(f"{count} sequences")
        together[count], bandwidths = _time_sequences(model, ids, count, reader)
        if bandwidth is not None:
            together_bandwidth[count] = statistics.median(bandwidths)
            bandwidth = max(bandwidth, *bandwidths)
    variant = model.variant
    del model, reader
    peak_macs = None
    if device is None and limits is not None:
        say("int8 peak")
        peak_macs = limits.int8_peak()
    return Report(
        **artifact_facts(manifest, variant),
        cpu=cpu_name(),
        cores=physical_cores(),
        memory_bytes=memory_bytes(),
        date=date,
        bandwidth=bandwidth,
        bandwidth_at={depth: bandwidth_at[depth] for depth in depths if depth in bandwidth_at},
        int8_peak=peak_macs,
        load_seconds=load_seconds,
        first_token_seconds=first_token_seconds,
        resident_bytes=resident,
        peak_bytes=peak,
        outside_share=outside_share,
        prefill=prefill,
        decode={depth: decode[depth] for depth in depths},
        other_processes=others.share(),
        device=device,
        device_bytes=device_bytes,
        sequences=together,
        sequences_bytes={n: step_bytes(manifest, n, SEQUENCE_DEPTH) for n in together},
        sequences_bandwidth=together_bandwidth,
    )


def fitting(
    path: str | Path, manifest: Manifest, lengths: Sequence[int], depths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The prefill lengths and decode depths that fit the context, each once; a warning names the
    others."""
    most = manifest.context - WARMUP_STEPS - DECODE_STEPS
    kept = ([n for n in lengths if n <= manifest.context], [n for n in depths if n <= most])
    left_out = [f"prefill {n}" for n in lengths if n > manifest.context]
    left_out += [f"decode at {n}" for n in depths if n > most]
    if left_out:
        warnings.warn(
            f"{path}: left out {', '.join(left_out)}: the artifact's context has "
            f"{manifest.context} positions, and {WARMUP_STEPS + DECODE_STEPS} decode steps are "
            "measured",
            stacklevel=2,
        )
    return list(dict.fromkeys(kept[0])), list(dict.fromkeys(kept[1]))


def _device_facts(model: Model) -> tuple[str | None, int | None]:
    """What `Report` calls device and device_bytes. TVM's runtime tells neither the device's name
    nor what it holds: the system tells the one, and the other is what the model was loaded for."""
    device = model._runner.device
    if isinstance(device, Device):
        return None, None
    if isinstance(device, TensorDevice):
        name = f"{gpu_name() or 'GPU'} ({model.manifest.device}, {system_name()})"
        return name, device.needed_bytes
    return device.name, device.usage.num_bytes


def _open_reader(model: Model, limits: Limits | None) -> Reader | None:
    """What reads the memory that the model's kernels read; None if that takes a compiler, and
    none is here."""
    device = model._runner.device
    if not isinstance(device, Device | TensorDevice):  # its driver compiles what reads it
        return DeviceReader(model.manifest.runtime, device.opened)
    return limits.open_reader(model) if limits is not None else None


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


def _time_decode(model: Model, ids: list[int], reader: Reader | None) -> tuple[Timing, list[float]]:
    """Single steps, without sampling but where the device chooses the token; and bytes a second
    that `reader` read between them."""
    sampler = Sampler(SamplingOptions(temperature=0), model._questions.reserved)
    seconds, bandwidths = [], []
    others = OtherProcesses()
    for token in ids:
        if reader is not None:  # where the steps are computed, on the same threads
            bandwidths.append(reader.num_bytes / model._driver.call(reader.seconds))
        start = time.perf_counter()
        if model._runner.chooser is not None:
            model._driver.call(partial(_choose_next, model, sampler, token))
        else:
            model.decode(token)
        seconds.append(time.perf_counter() - start)
    return timing(seconds[WARMUP_STEPS:], others), bandwidths[WARMUP_STEPS:]


def _time_sequences(
    model: Model, ids: list[int], count: int, reader: Reader | None
) -> tuple[Timing, list[float]]:
    """Steps that compute the next token of each of several sequences, and choose the most probable
    one, as an engine does: on the device where the logits are there. Those of 64 sequences are 50
    MB, which no engine copies."""
    model.forget()
    runner, cache = model._runner, model._runner.cache
    samplers = [
        Sampler(SamplingOptions(temperature=0), model._questions.reserved) for _ in range(count)
    ]
    seconds, bandwidths = [], []
    others = OtherProcesses()

    def start() -> list[CachedSequence]:
        running = [cache.start() for _ in range(count)]
        for i, sequence in enumerate(running):
            part = [i, *ids[: SEQUENCE_DEPTH - 1]]  # so that none is another's prefix
            sequence.begin(len(part))
            sequence.append(part)
        _fill_pages(model)
        return running

    def step(tokens: list[int]) -> None:
        rows = [Rows(s, [token]) for s, token in zip(running, tokens, strict=True)]
        for sample in runner.sample(runner.step(rows), samplers):
            if isinstance(sample, ArtifactError):
                raise sample

    running = model._driver.call(start)
    for i in range(WARMUP_STEPS + DECODE_STEPS):
        tokens = [ids[(i * count + j) % len(ids)] for j in range(count)]
        if reader is not None:
            bandwidths.append(reader.num_bytes / model._driver.call(reader.seconds))
        begin = time.perf_counter()
        model._driver.call(partial(step, tokens))
        seconds.append(time.perf_counter() - begin)
    for sequence in running:
        model._driver.call(partial(cache.leave, sequence))
    return timing(seconds[WARMUP_STEPS:], others), bandwidths[WARMUP_STEPS:]


def _choose_next(model: Model, sampler: Sampler, token: int) -> None:
    model._sample(sampler, model._decode(token))


def _fill_cache(model: Model, ids: list[int]) -> None:
    """As if `ids` went before, with random keys and values: a step takes as long whatever they
    are, and to compute those of 16,384 tokens takes minutes."""
    model.forget()
    model._driver.call(partial(_write_cache, model, ids))


def _write_cache(model: Model, ids: list[int]) -> None:
    for start in range(0, len(ids), model.manifest.chunk):
        part = ids[start : start + model.manifest.chunk]
        model._sequence.begin(len(part))
        model._sequence.append(part)
    _fill_pages(model)


def _fill_pages(model: Model) -> None:
    """Write random keys and values to the pages that are in use."""
    cache, rng = model._runner.cache, np.random.default_rng(0)
    used = cache.pages_used()
    for i, (array, facts) in enumerate(zip(cache.arrays, model.manifest.caches, strict=True)):
        count = used[model.manifest.sliding[i // 2]]
        if count:
            pages = rng.standard_normal((count, *facts.shape), np.float32).astype(facts.dtype)
            model._runner.device.write(array, pages)


def _outside_share(model: Model, ids: list[int]) -> float | None:
    """Share of a step of `generate` that passes outside the compiled function, where Python samples
    and makes text. None if the context, or a stop id each time, leaves no second token."""
    model.forget()
    shares: list[float] = []
    with _inside(model._runner.device) as inside:
        for token in ids[:STREAMS]:
            count = 1 + DECODE_STEPS - len(shares)
            stream = model.generate([token], max_tokens=count, temperature=0)
            next(stream)
            inside.clear()
            start = time.perf_counter()
            for _ in stream:
                now = time.perf_counter()
                shares.append(1 - sum(inside) / (now - start))
                inside.clear()
                start = now
            if len(shares) >= DECODE_STEPS:
                break
    return statistics.median(shares) if shares else None


@contextmanager
def _inside(device: Device | TensorDevice | LaunchDevice) -> Iterator[list[float]]:
    """Seconds of every call of a compiled function, and of every wait for what one returned, in a
    list that grows."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    hidden = {"run": timed(device.run), "numpy": timed(device.numpy)}
    vars(device).update(hidden)  # they hide the methods
    try:
        yield seconds
    finally:
        for name in hidden:
            del vars(device)[name]


def timing(seconds: list[float], others: OtherProcesses | None) -> Timing:
    return Timing(
        median=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        runs=len(seconds),
        other_processes=others.share() if others is not None else None,
    )
