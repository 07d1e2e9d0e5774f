"""`inspect`: say what an artifact is and what it needs; nothing of it is loaded."""

import argparse
from pathlib import Path

from ..artifact import read_manifest
from ..engine import SEQUENCES
from ..errors import InputError, OsscompileError
from ..fidelity import fidelity_rows, read_fidelity
from ..manifest import ANY, Manifest
from ..memory import memory_bytes
from ..requantised import read_requantised, requantised_by_layer, requantised_summary
from .main import Commands
from .options import add_kv_memory
from .terminal import print_table


def add_inspect(commands: Commands) -> None:
    command = commands.add_parser("inspect", help="say what an artifact is and what it needs")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument("--context", type=int, metavar="N", help="positions to plan for")
    command.add_argument(
        "--layers", action="store_true", help="of experts that were quantised, every layer"
    )
    add_kv_memory(command)
    command.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(Path(arguments.artifact))
    context = manifest.context if arguments.context is None else arguments.context
    if not 1 <= context <= manifest.context:
        raise InputError(f"context: expected 1 to {manifest.context}, found {context}")
    needed = memory_bytes(manifest, context, arguments.kv_memory)
    by_system = manifest.system != ANY
    here = manifest.variant_here() if by_system else None  # a device is asked when it is used
    machine = (
        f"{manifest.system} {manifest.architecture}, {manifest.device}"
        if by_system
        else f"any device of {manifest.runtime}"
    )
    print_table(
        [
            ("model", f"{manifest.model}, profile {manifest.profile}"),
            ("made by", f"osscompile {manifest.compiler}"),
            ("target", f"{manifest.target}: {machine}"),
            ("layers", f"{len(manifest.sliding)}, {sum(manifest.sliding)} of them sliding"),
            ("context", f"{manifest.context} positions, prefill in {manifest.chunk}"),
            ("vocabulary", f"{manifest.vocab_size} ids"),
            ("sampling", ", ".join(f"{n} {v:g}" for n, v in vars(manifest.sampling).items())),
        ]
    )
    print("\nvariants, best first" + (": none runs here" if by_system and here is None else ""))
    print_table(
        [
            (f"  {v.name}", ", ".join(v.cpu_features) + " (runs here)" * (v == here))
            for v in manifest.variants
        ]
    )
    print(f"\nmemory at {context} positions")
    rows = [*needed.items(), ("total", sum(needed.values()))]
    together = memory_bytes(manifest, context, arguments.kv_memory, SEQUENCES)
    rows.append((f"for {SEQUENCES} sequences, as serve runs", sum(together.values())))
    print_table([(f"  {name}", f"{size / 1e6:,.1f} MB") for name, size in rows])
    _print_requantised(Path(arguments.artifact), manifest, arguments.layers)
    _print_fidelity(Path(arguments.artifact), manifest)
    print("\nfiles")
    print_table([(f"  {n}", f"{f.num_bytes:,} bytes") for n, f in sorted(manifest.files.items())])


def _print_requantised(artifact: Path, manifest: Manifest, by_layer: bool) -> None:
    try:
        changed = read_requantised(artifact, manifest)
    except OsscompileError as error:  # what else the artifact is can still be told
        print(f"\n{error}")
        return
    if changed:
        print(f"\n{requantised_by_layer(changed) if by_layer else requantised_summary(changed)}")


def _print_fidelity(artifact: Path, manifest: Manifest) -> None:
    try:
        fidelity = read_fidelity(artifact)
    except OsscompileError as error:
        print(f"\n{error}")
        return
    if fidelity is None:
        print("\nfidelity: not measured; `osscompile measure-fidelity OUT MODEL` does it")
    elif fidelity.manifest_sha256 != manifest.sha256:
        print("\nfidelity: what was measured is of another compile; measure again")
    else:
        print("\nfidelity")
        print_table([(f"  {name}", value) for name, value in fidelity_rows(fidelity)])
