"""Facts about each machine: one TOML file for each target, read into frozen `Target`s."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import OsscompileError
from ..runtime.machine import Machine

PREFILL_CHUNK = 512  # longer prompts take several calls


class TargetError(OsscompileError):
    """A target is unknown, incomplete, or cannot run what was asked of it."""


@dataclass(frozen=True)
class Target:
    """Facts about one machine. Code branches on these, never on a name."""

    name: str
    variant: str  # of the machine's instructions; the name again if there is only one
    description: str
    checked: str  # says what ran on such a machine, under emulation, or was only compiled
    family: str  # of its schedules: "cpu" or "gpu"
    runtime: str  # that executes its artifacts: "tvm" (a shared library), "opencl" or "cuda"
    device: str  # of TVM's runtime: "cpu" or "metal"; empty for other runtimes
    prefill_chunk: int  # tokens of one prefill call, unless a compile says otherwise
    tvm: dict[str, Any]  # the TVM target
    system: str  # platform.system() where artifacts run, or "any"
    architecture: str  # platform.machine() where artifacts run, or "any"
    cpu_features: tuple[str, ...]  # names as in /proc/cpuinfo
    vector_bits: int  # in a group of rows of packed weights
    register_bits: int  # in a vector register; 0 for a GPU, as `num_registers` is
    num_registers: int  # for vectors
    max_threads: int  # in a work-group; 0 for a CPU, as `subgroup_size` is
    subgroup_size: int  # threads that execute an instruction together
    load_bits: int  # that a thread loads or stores at once; 0 for a CPU
    shared_bytes: int  # of memory that a launch may give a work-group; 0 if only kernels declare it
    int8_dot: str | None  # instruction that sums products of bytes
    matrix: str | None  # instruction that multiplies matrices of float32
    bf16_matrix: str | None  # instruction that multiplies matrices of bfloat16
    selects_bytes: bool  # an instruction takes four of eight bytes, or their signs
    has_shuffles: bool  # threads of a subgroup read each other's registers
    has_dependent_launch: bool  # a kernel may begin early, and wait for the one before itself
    has_textures: bool  # units that read memory through a cache of their own
    dtypes: tuple[str, ...]  # legal for kernel arguments
    has_exp: bool
    has_half: bool  # arithmetic in float16
    nearest_even: str | None  # function that rounds to nearest even, if TVM knows none
    link_triple: str  # for the linker: architecture, system, C library and its oldest version
    link_flags: tuple[str, ...]  # for the linker of that system
    library: str  # file name of the compiled library

    @property
    def vector_lanes(self) -> int:
        """32-bit lanes in a group, each for one of a weight's rows that are interleaved."""
        return self.vector_bits // 32


def names(folder: Path | None = None) -> list[str]:
    """Return the targets to compile for: the TOML files of `folder` (default: those shipped)."""
    return sorted(path.stem for path in (folder or _shipped()).glob("*.toml"))


def load_variants(name: str, folder: Path | None = None) -> tuple[Target, ...]:
    """Return the variants of the target of that name, best first; TargetError if there is no such
    target or its file is incomplete.

    They differ in instructions only: the same packed weights serve all of them.
    """
    path = (folder or _shipped()) / f"{name}.toml"
    if name not in names(folder):
        raise TargetError(
            f"target: expected one of {', '.join(names(folder))}, found {name!r:.200}; "
            "`osscompile targets` describes them"
        )
    try:
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
        machine, capabilities, link = facts["machine"], facts["capabilities"], facts["link"]
        is_gpu, runtime = facts["family"] == "gpu", facts.get("runtime", "tvm")
        target = Target(
            name=name,
            variant=name,
            description=facts["description"],
            checked=facts["checked"],
            family=facts["family"],
            runtime=runtime,
            device=facts.get("device", "cpu" if runtime == "tvm" else ""),
            prefill_chunk=facts.get("prefill_chunk", PREFILL_CHUNK),
            tvm=facts["tvm"],
            system=machine["system"],
            architecture=machine["architecture"],
            cpu_features=tuple(machine["cpu_features"]),
            vector_bits=capabilities["vector_bits"],
            register_bits=0 if is_gpu else capabilities["register_bits"],
            num_registers=0 if is_gpu else capabilities["num_registers"],
            max_threads=capabilities["max_threads"] if is_gpu else 0,
            subgroup_size=capabilities["subgroup_size"] if is_gpu else 0,
            load_bits=capabilities.get("load_bits", 32) if is_gpu else 0,
            shared_bytes=capabilities.get("shared_bytes", 0),
            int8_dot=capabilities.get("int8_dot"),
            matrix=capabilities.get("matrix"),
            bf16_matrix=capabilities.get("bf16_matrix"),
            selects_bytes=capabilities.get("selects_bytes", False),
            has_shuffles=capabilities.get("shuffles", False),
            has_dependent_launch=capabilities.get("dependent_launch", False),
            has_textures=capabilities.get("textures", False),
            dtypes=tuple(capabilities["dtypes"]),
            has_exp=capabilities["exp"],
            has_half=capabilities.get("half", True),
            nearest_even=capabilities.get("nearest_even"),
            link_triple=link["triple"],
            link_flags=tuple(link["flags"]),
            library=link["library"],
        )
        return tuple(_variant(target, v) for v in facts.get("variants", ())) or (target,)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise TargetError(
            f"{path}: expected the fields of targets/x86.toml, found a problem with {error}"
        ) from error


def of_this_machine() -> Target:
    """Return the best variant that runs here of the target whose system, architecture and CPU
    features this machine has, with the widest vectors; TargetError if there is none."""
    here = Machine.here()
    fitting = [
        target
        for name in names()
        for target in load_variants(name)
        if (target.system, target.architecture) == (here.system, here.architecture)
        and set(target.cpu_features) <= set(here.cpu_features)
    ]
    if not fitting:
        raise TargetError(
            f"target: none fits this machine ({here.system} on {here.architecture}); choose one "
            f"of {', '.join(names())} to compile for another machine"
        )
    return max(fitting, key=lambda target: target.vector_bits)  # the first among equals


def _variant(target: Target, facts: dict[str, Any]) -> Target:
    library = Path(target.library)
    return dataclasses.replace(
        target,
        variant=facts["name"],
        checked=facts.get("checked", target.checked),
        tvm=target.tvm | facts.get("tvm", {}),
        cpu_features=(*target.cpu_features, *facts.get("cpu_features", ())),
        int8_dot=facts.get("int8_dot", target.int8_dot),
        register_bits=facts.get("register_bits", target.register_bits),
        num_registers=facts.get("num_registers", target.num_registers),
        library=f"{library.stem}-{facts['name']}{library.suffix}",
    )


def _shipped() -> Path:
    return Path(__file__).parent
