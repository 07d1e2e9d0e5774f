"""The whole story on one page: from a model to an artifact for one machine."""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm
from tvm import ir

from . import targets
from .codegen.cuda import build_cuda
from .codegen.library import build_library
from .codegen.opencl import build_opencl
from .codegen.tools import end_tools
from .errors import CheckpointError, CompileError
from .importer.choice import with_choose
from .importer.config import ModelConfig
from .importer.graph import (
    PROFILES,
    Parameter,
    build_graph,
    most_wanted,
)
from .importer.resolve import Resolved, resolve_model
from .importer.weights import KeptScales, weight_pieces
from .options import adapters_option, names_option, path_option, shown, whole_number
from .passes import LAUNCH_PASSES, SHARED_PASSES, VARIANT_PASSES, run_passes
from .passes.pack_weights import PACKED_ROWS
from .passes.plan_memory import WORKSPACE
from .runtime.artifact import hash_file, mark_verified
from .runtime.manifest import (
    CHAT_TEMPLATE,
    CPU,
    MANIFEST,
    REQUANTISED,
    TOKENIZER,
    WEIGHTS,
    File,
    Manifest,
    Tensor,
    Variant,
)
from .runtime.requantised import requantised_by_layer
from .runtime.version import __version__
from .schedules.records import Records
from .targets import Target, TargetError
from .threads import worker_threads
from .tuning.records import records_of_compile
from .tuning.watched_records import WatchedRecords
from .write import check_replaceable, staged_directory, weights_file_bytes, write_weights

# By what executes the artifact: how kernels are lowered for it, and what makes its library.
BUILDS = {
    "tvm": (VARIANT_PASSES, build_library),
    "opencl": (LAUNCH_PASSES, build_opencl),
    "cuda": (LAUNCH_PASSES, build_cuda),
}
GATHERED = ("rope", "embed.")  # beginnings of the names of weights that are read row by row
OTHER_FILES_BYTES = 64 << 20  # room for library, tokenizer and manifest


def compile(
    model: str | Path,
    target: str | None = None,
    output: str | Path | None = None,
    *,
    variants: str | Iterable[str] | None = None,
    profile: str = "fast",
    context: int | None = None,
    adapters: str | Path | Iterable[str | Path] | None = None,
    dump: str | Path | None = None,
    prefill_chunk: int | None = None,
    records: str | Path | None = None,
    progress: bool = False,
) -> Path:
    """Compile a model for a target and return the artifact's directory.

    `model`: a directory with a checkpoint, a GGUF file, a model in Ollama's store by its name, a
    Hugging Face id, "nano", or "synthetic:gpt-oss-20b" (also gpt-oss-120b, tiny). `target`: one of
    `targets.names()` (default: the one for this machine). `output`: default NAME-TARGET.osc here.
    `variants`: of the target's CPUs, by name, those to compile for (default: all).
    `profile`: "fast" (int8 dense weights and activations) or "exact" (bfloat16 weights, float32
    activations). `context`: most positions (default: the model's). `adapters`: folders of LoRA
    adapters of PEFT, merged in order. `dump`: a folder for the IR after each phase.
    `prefill_chunk`: tokens of one prefill (default: the target's, 512 or 2,048); a smaller one
    takes less workspace. `records`: a file of `osscompile tune` for the one variant, whose
    constants are taken before the package's (default: that in the user's own folder, for each
    variant that has one).
    Raises CheckpointError, TargetError or CompileError; nothing is left behind.
    """
    target = target if target is not None else targets.of_this_machine().name
    machines = _choose_variants(target, variants)
    machine = machines[0]  # what they differ in is not looked at before their kernels are scheduled
    output = path_option("output", output) if output is not None else None
    dump = path_option("dump", dump) if dump is not None else None
    records = path_option("records", records) if records is not None else None
    given = prefill_chunk if prefill_chunk is not None else machine.prefill_chunk
    prefill_chunk = whole_number("prefill_chunk", given)
    resolved = open_model(model, adapters)
    config = resolved.source.config
    context = _check_options(config, profile, context, prefill_chunk, machine)
    if output is None:
        output = path_option("output", f"{resolved.name}-{machine.name}.osc")
    constants = _read_records(machines, records, progress)
    check_replaceable(output)  # checked again below, but better told before the work

    _say(progress, f"building the graph: {config.num_layers} layers, {config.num_experts} experts")
    graph = build_graph(config, profile, context, prefill_chunk)
    module = graph.module
    if machine.device != CPU:  # its logits are not in the host's memory
        module = with_choose(module, config.vocab_size, most_wanted(prefill_chunk))
    module = run_passes(module, machine, SHARED_PASSES, dump)

    packing = {name: (int(v[0]), int(v[1])) for name, v in module.attrs[PACKED_ROWS].items()}
    parameters = {p.name: p for p in graph.weights}
    weights = tuple(_packed(p, packing.get(p.name)) for p in graph.weights)
    size = weights_file_bytes(weights)
    kept = KeptScales()
    with staged_directory(output, size + OTHER_FILES_BYTES) as folder:
        names = ", ".join(m.variant for m in machines)
        _say(progress, f"compiling its kernels for {machine.description}: {names}")
        workspace_bytes = _build_libraries(module, machines, constants, folder, dump, progress)
        with tqdm(
            total=size, unit="B", unit_scale=True, desc="repacking weights", disable=not progress
        ) as bar:
            weights_sha256 = write_weights(
                folder / WEIGHTS,
                weights,
                lambda t: weight_pieces(
                    parameters[t.name], resolved.source, packing.get(t.name), kept
                ),
                bar.update,
            )
        _tell_requantised(resolved, folder)
        _copy_tokenizer(resolved, folder)
        if resolved.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_bytes(resolved.chat_template.encode())
        manifest = Manifest(
            model=resolved.name,
            compiler=__version__,
            profile=profile,
            target=machine.name,
            runtime=machine.runtime,
            device=machine.device,
            system=machine.system,
            architecture=machine.architecture,
            variants=tuple(Variant(m.variant, m.cpu_features, m.library) for m in machines),
            vocab_size=config.vocab_size,
            context=context,
            window=config.window,
            sliding=config.sliding,
            experts_per_token=config.num_experts_per_token,
            norm_eps=config.norm_eps,
            swiglu_limit=config.swiglu_limit,
            chunk=prefill_chunk,
            most_wanted=most_wanted(prefill_chunk),
            workspace_bytes=workspace_bytes,
            caches=tuple(Tensor(c.name, c.shape, c.dtype) for c in graph.caches),
            weights=weights,
            decode_bytes=decode_bytes(config, weights),
            gathered=tuple(w.name for w in weights if w.name.startswith(GATHERED)),
            eos_token_ids=resolved.eos_token_ids,
            sampling=resolved.sampling,
            files=_files(folder, weights_sha256),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    mark_verified(output / WEIGHTS, weights_sha256)
    return output


def open_model(
    model: str | Path, adapters: str | Path | Iterable[str | Path] | None = None
) -> Resolved:
    """What `compile` compiles. Raises CheckpointError."""
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"model: expected a name or a directory, found {model!r:.200}")
    merged = adapters_option(adapters)
    with worker_threads(1) as pool:  # a download that is interrupted waits for its own threads
        return pool.submit(resolve_model, model, merged).result()


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr)


def _choose_variants(target: str, names: str | Iterable[str] | None) -> tuple[Target, ...]:
    """Those of that name, or all, in the order of the target's file."""
    variants = targets.load_variants(target)
    known = [v.variant for v in variants]
    names = names_option("variants", names) if names is not None else None
    unknown = [name for name in names or () if name not in known]
    if unknown or (names is not None and not names):
        raise TargetError(
            f"variants of {target}: expected some of {', '.join(known)}, "
            f"found {', '.join(map(shown, unknown)) if any(unknown) else 'none'}"
        )
    return tuple(v for v in variants if names is None or v.variant in names)


def _read_records(machines: tuple[Target, ...], file: Path | None, progress: bool) -> list[Records]:
    """Constants of the schedules, for each variant."""
    if file is not None and len(machines) > 1:
        raise CompileError(
            f"records: expected one variant to compile for, because a file has those of one, found "
            f"{', '.join(m.variant for m in machines)}; choose with --variants"
        )
    found = []
    for machine in machines:
        constants, read = records_of_compile(machine, file)
        if read is not None:
            _say(progress, f"constants of {machine.variant} are from {read}, before the package's")
        found.append(constants)
    return found


def _build_libraries(
    module: ir.IRModule,
    machines: tuple[Target, ...],
    constants: list[Records],
    folder: Path,
    dump: Path | None,
    progress: bool,
) -> dict[str, int]:
    """Schedule and compile the packed module for each of them; returns the workspace of each
    function in bytes, which is the same for all."""
    passes, build = BUILDS[machines[0].runtime]
    lowered = []
    libraries = [folder / machine.library for machine in machines]
    with (
        tqdm(total=2 * len(machines), unit="step", disable=not progress) as bar,
        worker_threads(os.cpu_count() or 1) as pool,  # LLVM works without Python's lock
    ):
        for machine, records in zip(machines, constants, strict=True):
            bar.set_description(f"scheduling kernels for {machine.variant}")
            phases = dump / machine.variant if dump is not None else None
            lowered.append(run_passes(module, machine, passes, phases, SHARED_PASSES, records))
            if isinstance(records, WatchedRecords):
                records.warn_of_unused()
            bar.update()
        bar.set_description(f"compiling {', '.join(library.name for library in libraries)}")
        try:
            for _ in pool.map(build, lowered, machines, libraries):
                bar.update()
        except KeyboardInterrupt:
            end_tools(folder)
            raise
    first, *others = ({f: int(n) for f, n in sorted(m.attrs[WORKSPACE].items())} for m in lowered)
    assert all(other == first for other in others), (first, others)
    return first


def _check_options(
    config: ModelConfig, profile: str, context: int | None, chunk: int, target: Target
) -> int:
    if profile not in PROFILES:
        raise CompileError(
            f"profile: expected one of {', '.join(PROFILES)}, found {profile!r:.200}"
        )
    context = config.max_context if context is None else whole_number("context", context)
    if not 1 <= context <= config.max_context:
        raise CompileError(
            f"context: expected 1 to {config.max_context} (the model's limit), found {context}"
        )
    most = max(target.prefill_chunk, config.max_context)
    if not 1 <= chunk <= most:
        raise CompileError(f"prefill_chunk: expected 1 to {most} tokens, found {chunk}")
    return context


def _packed(parameter: Parameter, packing: tuple[int, int] | None) -> Tensor:
    """The weight as the artifact holds it: with its rows side by side if they are packed."""
    shape = parameter.shape
    if packing is not None:
        axis, lanes = packing
        shape = (*shape[:axis], shape[axis] // lanes, *shape[axis + 1 :], lanes)
    return Tensor(parameter.name, shape, parameter.dtype)


def decode_bytes(config: ModelConfig, weights: tuple[Tensor, ...]) -> int:
    """Bytes of weights that one decode step reads: of the experts only those chosen."""
    total = 0
    for weight in weights:
        if not weight.name.startswith(GATHERED):
            chosen = config.num_experts_per_token / config.num_experts
            share = chosen if ".gate_up." in weight.name or ".down." in weight.name else 1
            total += round(weight.num_bytes * share)
    return total


def _tell_requantised(resolved: Resolved, folder: Path) -> None:
    """Now, and to who inspects the artifact."""
    changed = resolved.source.requantised()
    if changed:
        warnings.warn(requantised_by_layer(changed), stacklevel=3)
        (folder / REQUANTISED).write_text(json.dumps(changed, indent=1) + "\n", encoding="utf-8")


def _copy_tokenizer(resolved: Resolved, folder: Path) -> None:
    if isinstance(resolved.tokenizer, bytes):
        (folder / TOKENIZER).write_bytes(resolved.tokenizer)
    elif resolved.tokenizer is not None:
        shutil.copyfile(resolved.tokenizer, folder / TOKENIZER)
    else:
        warnings.warn(
            f"{resolved.name} has no tokenizer.json: the artifact will take token ids only",
            stacklevel=3,
        )


def _files(folder: Path, weights_sha256: str) -> dict[str, File]:
    files = {}
    for path in sorted(folder.iterdir()):
        sha256 = weights_sha256 if path.name == WEIGHTS else hash_file(path)
        files[path.name] = File(path.stat().st_size, sha256)
    return files
