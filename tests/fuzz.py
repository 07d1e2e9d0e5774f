"""Files that nobody vouches for, damaged at random: what reads them accepts them or raises an error
of ours, and what it accepts can be used.

test_fuzz.py tries some of each. The long form, here a million of each but `load`:

    for what in manifest programs tokenizer config header fidelity requantised; do
        python tests/fuzz.py $what 1000000; done; python tests/fuzz.py load 2000

It runs with the memory limited, prints how many were accepted, and ends with the traceback and the
number of the first that failed; a third argument is the number to begin with.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from artifacts import TINY_OPTIONS, reseal
from test_config import GPT_OSS_20B
from test_tokenizer import TEXTS, write_tokenizer

import osscompile
from osscompile.importer.checkpoint import canonical_shapes
from osscompile.importer.config import parse_config
from osscompile.importer.graph import cache_parameters, weight_parameters
from osscompile.importer.synthetic import TINY
from osscompile.importer.weights import rope_table
from osscompile.runtime.artifact import Artifact
from osscompile.runtime.devices.program import (
    INPUTS,
    MEMORY,
    Launch,
    Program,
    evaluate,
    read_programs,
    write_programs,
)
from osscompile.runtime.errors import OsscompileError
from osscompile.runtime.fidelity import (
    FIDELITY,
    Fidelity,
    Parting,
    fidelity_rows,
    read_fidelity,
    write_fidelity,
)
from osscompile.runtime.manifest import (
    CHAT_TEMPLATE,
    MANIFEST,
    REQUANTISED,
    TOKENIZER,
    WEIGHTS,
    File,
    Manifest,
    Tensor,
    Variant,
    parse_manifest,
)
from osscompile.runtime.memory import memory_bytes
from osscompile.runtime.requantised import (
    read_requantised,
    requantised_by_layer,
    requantised_summary,
)
from osscompile.runtime.safetensors import map_tensors
from osscompile.runtime.sampler import Sampler
from osscompile.runtime.sampling_options import Sampling, SamplingOptions
from osscompile.runtime.step import FEW, FUNCTIONS
from osscompile.runtime.tokenizer import Tokenizer

MODEL = dataclasses.replace(TINY, num_layers=2, sliding=(True, False))
MEMORY_LIMIT = 6 << 30  # bytes of address space, of which libraries take two
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    16,
    64,
    255,
    1024,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    1 << 48,
    1 << 63,
    1 << 94,
]
ODD: list[Any] = [
    *NUMBERS,
    *(-n for n in NUMBERS[1:]),
    *(None, True, False, 0.5, 1.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 10**400),
    *("", "a", "tokens", "../x", "..", "/", "\ud800", "\0", "é", "\n", "x" * 300, "float32", "U8"),
    *([], {}, [[]], [0], {"a": 1}, ["*", "tokens", 1 << 40], ["//", "tokens", 0]),
]


def mutate(root: Any, random: Random) -> None:
    """Change one thing inside an object or list out of JSON."""
    node = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = random.choice(keys)
        inner = node[key]
        if not (isinstance(inner, dict | list) and inner and random.random() < 0.9):
            break
        node = inner
    change = random.randrange(8)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, list):
        node.insert(key, inner)
    elif change == 1:
        node[str(random.choice(ODD))] = inner
    elif change == 2:
        node[key] = node[random.choice(keys)]
    elif change == 3 and type(inner) is int:
        node[key] = inner + random.choice((-16, -1, 1, 16))
    elif change == 4 and type(inner) is int:
        node[key] = inner * random.choice((2, 8, 1 << 20))
    elif change == 5 and isinstance(inner, str) and inner:
        at = random.randrange(len(inner))
        node[key] = inner[:at] + chr(random.randrange(1, 0x180)) + inner[at + 1 :]
    else:
        node[key] = copy.deepcopy(random.choice(ODD))  # changes of a change stay its own


def mutated(text: str, random: Random) -> Any:
    """What is written in JSON, with one to four changes. At times a number changes wherever it
    stands, so that fields still fit each other."""
    while random.random() < 0.3:
        old = random.choice(re.findall(r"(?<![\w.])\d+(?![\w.])", text) or ["0"])
        new = random.choice((int(old) * 2, int(old) // 2, int(old) + 16, random.choice(NUMBERS)))
        text = re.sub(rf"(?<![\w.]){old}(?![\w.])", str(new), text)
        if random.random() < 0.5:
            return json.loads(text)
    fields = json.loads(text)
    for _ in range(random.randrange(1, 5)):
        mutate(fields, random)
    return fields


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """One to four bytes changed, cut out or put in, or the end cut off."""
    damaged = bytearray(content)
    for _ in range(random.randrange(1, 5)):
        at, change = random.randrange(len(damaged) + 1), random.randrange(8)
        if change == 0:
            del damaged[at:]
        elif change == 1:
            del damaged[at : at + 1]
        elif change == 2:
            damaged[at:at] = bytes([random.randrange(256)])
        else:
            damaged[at : at + 1] = bytes([random.randrange(256)])
    return bytes(damaged)


def small_manifest(runtime: str) -> Manifest:
    """That of a model which is not compiled."""
    tensors = weight_parameters(MODEL, "exact", 64), cache_parameters(MODEL, "exact")
    weights, caches = (tuple(Tensor(p.name, p.shape, p.dtype) for p in part) for part in tensors)
    names = (WEIGHTS, TOKENIZER, "lib.so", "lib.launches")
    return Manifest(
        model="tiny",
        compiler="0",
        profile="exact",
        target="x86",
        runtime=runtime,
        device="cpu",
        system="Linux",
        architecture="x86_64",
        variants=(Variant("generic", ("sse2",), "lib.so"),),
        vocab_size=MODEL.vocab_size,
        context=64,
        window=MODEL.window,
        sliding=MODEL.sliding,
        experts_per_token=MODEL.num_experts_per_token,
        norm_eps=MODEL.norm_eps,
        swiglu_limit=MODEL.swiglu_limit,
        chunk=16,
        most_wanted=16,
        workspace_bytes=dict.fromkeys(FUNCTIONS, 1000),
        caches=caches,
        weights=weights,
        decode_bytes=1000,
        gathered=("rope", "embed.weight"),
        eos_token_ids=(1, 2),
        sampling=Sampling(0.5, 0.25, 7, 0.125),
        files={name: File(sum(w.num_bytes for w in weights) + 4096, "0" * 64) for name in names}
        | {CHAT_TEMPLATE: File(1000, "0" * 64)},
    )


def manifest_text(manifest: Manifest) -> str:
    """As it lies in its file, without the version and the hash."""
    fields = json.loads(manifest.to_json())
    del fields["format_version"], fields["manifest_sha256"]
    return json.dumps(fields)


def small_programs() -> dict[str, Program]:
    vocab = MODEL.vocab_size
    rows = ["//", ["+", ["*", "tokens", 4], 31], 32]
    many = Launch("k", (("input", 0), ("storage", 0), ("int32", "tokens")), (rows, 2), (32, 1))
    least = ("int64", ["min", "tokens", 7])
    few = Launch("few", (("bound", 3), ("storage", 1), least), (4,), (64,))
    one = Launch("one", (("bound", 3), ("storage", 1), ("int64", 7)), (4,), (64,), 1024, True)
    sizes = (4096, 16 * vocab * 4)
    symbols = {"tokens": 16, "tiles": 16, "wanted_rows": 16}
    return {
        "step": Program(sizes, (many, few), symbols, INPUTS["step"], 1, ("wanted_rows", vocab)),
        **{
            name: Program(sizes, (one,), {}, INPUTS[name], 1, (count, vocab))
            for count, name in FEW.items()
        },
        "choose": of_logits("choose", {"wanted_rows": 16}, "wanted_rows", 2),
        "limit": of_logits("limit", {"wanted_rows": 16}, 16, 2),
        "report": of_logits("report", {"wanted_rows": 16}, "wanted_rows", 42),
        "change": of_logits("change", {"changes": 4096}, "changes", 1),
    }


def of_logits(name: str, symbols: dict[str, int], rows: int | str, columns: int) -> Program:
    launch = Launch("pick", (("bound", 0), ("input", 0), ("storage", 1)), (4,), (64,))
    return Program((64, 16384), (launch,), symbols, INPUTS[name], 1, (rows, columns))


MANIFEST_TEXT = manifest_text(small_manifest("tvm"))
LAUNCHED = small_manifest("opencl")
PROGRAMS_TEXT = write_programs(small_programs())
CONFIG_TEXT = json.dumps(GPT_OSS_20B)


def try_manifest(random: Random, folder: Path) -> None:
    manifest = parse_manifest(mutated(MANIFEST_TEXT, random), folder)
    assert sum(memory_bytes(manifest, manifest.context).values()) < 1 << 60
    assert manifest.vocab_size * MODEL.hidden_size * 2 <= manifest.files[WEIGHTS].num_bytes
    assert manifest.files.get(CHAT_TEMPLATE, File(0, "")).num_bytes <= 1 << 20
    options = SamplingOptions(**dataclasses.asdict(manifest.sampling), seed=0)
    Sampler(options, np.empty(0, np.int64)).sample(np.zeros(8, np.float32))
    manifest.to_json().encode()


def try_programs(random: Random, folder: Path) -> None:
    contents = {"lib.launches": json.dumps(mutated(PROGRAMS_TEXT, random)).encode()}
    programs = read_programs(Artifact(folder, LAUNCHED, LAUNCHED.variants[0], (), contents))
    for program in programs.values():
        for number in range(1, max(program.symbols.values(), default=1) + 1):
            values = {symbol: min(number, most) for symbol, most in program.symbols.items()}
            for launch in program.launches:
                for kind, value in launch.arguments:
                    if kind not in MEMORY:
                        np.dtype(kind).type(evaluate(value, values))
                sizes = [evaluate(count, values) for count in launch.groups] + [*launch.threads]
                assert all(0 < size < 1 << 31 for size in sizes)


def try_tokenizer(random: Random, folder: Path) -> None:
    file = folder / TOKENIZER
    original = folder / "original.json"
    if not original.exists():
        write_tokenizer(original)
    if random.random() < 0.5:
        file.write_text(json.dumps(mutated(original.read_text(), random)))
    else:
        file.write_bytes(mutated_bytes(original.read_bytes(), random))
    tokenizer = Tokenizer(file)
    for text in (*TEXTS, *tokenizer.special):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, (text, ids)
        assert not set(ids) & set(tokenizer.special.values()), (text, ids)
        assert all(0 <= id < tokenizer.vocab_size for id in ids), (text, ids)


def try_config(random: Random, folder: Path) -> None:
    config = parse_config(mutated(CONFIG_TEXT, random), "config.json")
    if config.head_dim < 1 << 16:  # else the table is as large as the config says
        assert np.isfinite(rope_table(config, np.array([0, 1, 1 << 24]))).all()
    assert len(canonical_shapes(config)) == 3 + 15 * config.num_layers


def try_header(random: Random, folder: Path) -> None:
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, size in (
        ("a", "BF16", [3, 2], 12),
        ("b", "F32", [], 4),
        ("c", "U8", [0], 0),
    ):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries)
    if random.random() < 0.5:
        text = json.dumps(mutated(text, random))
    content = len(text).to_bytes(8, "little") + text.encode() + bytes(end)
    if random.random() < 0.5:
        content = mutated_bytes(content, random)
    file = folder / WEIGHTS
    file.write_bytes(content)
    for array in map_tensors(file).values():
        assert len(array.tobytes()) <= len(content)


def damage_json(file: Path, text: str, random: Random) -> None:
    if random.random() < 0.5:
        file.write_text(json.dumps(mutated(text, random)))
    else:
        file.write_bytes(mutated_bytes(text.encode(), random))


def try_fidelity(random: Random, folder: Path) -> None:
    parting = Parting(3, "'a'", "'b'", 0.5)
    numbers = (300, 1e-3, 0.5, 3, 299, 5.5, 5.25, (parting, parting))
    write_fidelity(folder, Fidelity("0" * 64, "v", "0", "2026-01-01", "m", "text", *numbers))
    damage_json(folder / FIDELITY, (folder / FIDELITY).read_text(), random)
    fidelity = read_fidelity(folder)
    assert fidelity is not None
    for name, value in fidelity_rows(fidelity):
        assert (name + value).isprintable()
        (name + value).encode()


def try_requantised(random: Random, folder: Path) -> None:
    changed = {"layers.0.gate_up": 0.125, "layers.0.down": 0.25, "layers.1.down": 0.0625}
    file = folder / REQUANTISED
    damage_json(file, json.dumps(changed), random)
    hashed = File(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    manifest = dataclasses.replace(LAUNCHED, files=LAUNCHED.files | {REQUANTISED: hashed})
    found = read_requantised(folder, manifest)
    for text in (requantised_summary(found), requantised_by_layer(found)):
        assert all(line.isprintable() for line in text.splitlines())


def try_load(random: Random, folder: Path) -> None:
    """From the manifest to tokens; `folder` has the tiny artifact."""
    artifact = folder / "tiny.osc"
    whole = folder / "whole.json"
    if not whole.exists():
        shutil.copy(artifact / MANIFEST, whole)

    def change(fields: dict[str, Any]) -> None:
        damaged = mutated(json.dumps(fields), random)
        fields.clear()
        fields.update(damaged)

    shutil.copy(whole, artifact / MANIFEST)
    reseal(artifact, change)
    model = osscompile.load(artifact)
    ids = list(range(min(20, model.context, model.vocab_size)))
    model.logits(ids)
    list(model.generate(ids[:9], max_tokens=2, temperature=1.0))


TRIES: dict[str, Callable[[Random, Path], None]] = {
    "manifest": try_manifest,
    "programs": try_programs,
    "tokenizer": try_tokenizer,
    "config": try_config,
    "header": try_header,
    "fidelity": try_fidelity,
    "requantised": try_requantised,
    "load": try_load,
}


def attempt(what: str, random: Random, folder: Path) -> bool:
    """Damage one file; whether it was accepted. Raises what is no error of ours."""
    with warnings.catch_warnings(action="error"):
        try:
            TRIES[what](random, folder)
        except OsscompileError:
            return False
    return True


def main(what: str, count: int, first: int = 0) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "load":
            with warnings.catch_warnings(action="ignore"):
                osscompile.compile("synthetic:tiny", output=folder / "tiny.osc", **TINY_OPTIONS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        accepted = 0
        for number in range(first, first + count):
            try:
                accepted += attempt(what, Random(number), folder)
            except BaseException:
                print(f"{what}: number {number} failed, after {accepted} that were accepted")
                raise
        print(f"{what}: {count} tried, {accepted} accepted, the others refused")


if __name__ == "__main__":
    os.environ.setdefault("RUST_BACKTRACE", "0")
    main(sys.argv[1], *map(int, sys.argv[2:]))
