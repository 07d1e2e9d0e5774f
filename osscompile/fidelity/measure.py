"""Compare an artifact with its checkpoint, and keep in it what came of that.

One scores the text after the other, because the weights of both need not fit the memory; meanwhile
the logits of the first lie on the disk, beside the artifact, where its like has room.
"""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import targets
from ..compiler import OTHER_FILES_BYTES, compile, open_model
from ..importer.graph import weight_parameters
from ..locks import only_holder
from ..options import adapters_option, path_option, whole_number
from ..runtime.artifact import read_manifest
from ..runtime.fidelity import Fidelity, FidelityError, check_writable, write_fidelity
from ..runtime.manifest import Tensor
from ..runtime.model import Model, load
from ..runtime.version import __version__
from .compare import Logits, compare_logits
from .same import check_same_model
from .text import scored_text

WORKPLACE = ".osscompile-fidelity"
NUM_TOKENS = 2048  # more than the dialogue has in the published vocabulary


def measure_fidelity(
    artifact: str | Path,
    model: str | Path,
    *,
    adapters: str | Path | Iterable[str | Path] | None = None,
    num_tokens: int = NUM_TOKENS,
    progress: bool = False,
) -> Fidelity:
    """Score a text with an artifact, and with the checkpoint that it is of in exact kernels.

    `artifact`: one that runs here. `model` and `adapters`: as for `compile`. `num_tokens`: of the
    text, at most. What comes of it is written into the artifact too. The model is compiled for this
    CPU in the profile "exact", beside the artifact, and removed again. Raises ArtifactError,
    CheckpointError, TargetError, CompileError, or FidelityError for a model that is another, and
    where an artifact or the folder that it is in cannot be written; nothing is left behind.
    """
    targets.of_this_machine()  # raises now rather than after half of the work
    path = Path(os.path.realpath(path_option("artifact", artifact)))
    num_tokens = whole_number("tokens", num_tokens)
    manifest = read_manifest(path)
    num_tokens = min(num_tokens, manifest.context)
    if num_tokens < 2:
        raise FidelityError(f"tokens: expected at least 2, found {num_tokens}")
    check_writable(path)
    measured = load(path, context=num_tokens)
    adapters = adapters_option(adapters)
    resolved = open_model(model, adapters)
    config = resolved.source.config
    check_same_model(str(model), config, path, manifest)
    tokenizer = measured.tokenizer
    text, ids = scored_text(manifest, tokenizer)
    ids = ids[:num_tokens]

    weights = weight_parameters(config, "exact", len(ids))
    exact_bytes = sum(Tensor(w.name, w.shape, w.dtype).num_bytes for w in weights)
    logits_bytes = len(ids) * manifest.vocab_size * np.dtype(np.float32).itemsize
    with _workplace(path, exact_bytes + logits_bytes + OTHER_FILES_BYTES) as folder:
        if progress:
            print(
                f"{len(ids)} tokens of {text} are scored with {path.name}, then with {model} in "
                f"exact kernels of this CPU, which take {exact_bytes / 1e9:.2f} GB here until "
                "the end",
                file=sys.stderr,
            )
        _write_rows(folder / "logits", _logits(measured, ids, path.name, progress))
        variant = measured.variant
        del measured  # its memory is the other's
        exact = _compile_exact(model, adapters, folder / "exact.osc", len(ids), progress)
        comparison = compare_logits(
            ids,
            _logits(load(exact), ids, "exact", progress),
            _read_rows(folder / "logits", manifest.vocab_size),
            lambda id: repr(tokenizer.decode([id])) if tokenizer is not None else str(id),
        )
    fidelity = Fidelity(
        manifest_sha256=manifest.sha256,
        variant=variant,
        compiler=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_printable(" + ".join(map(str, (model, *adapters)))),
        text=text,
        **comparison,
    )
    write_fidelity(path, fidelity)
    return fidelity


def _compile_exact(
    model: str | Path, adapters: Iterable[str | Path], output: Path, context: int, progress: bool
) -> Path:
    machine = targets.of_this_machine()
    with warnings.catch_warnings(action="ignore"):  # told when the artifact was compiled
        return compile(
            model,
            machine.name,
            output,
            variants=[machine.variant],
            profile="exact",
            context=context,
            adapters=adapters,
            progress=progress,
        )


@contextlib.contextmanager
def _workplace(artifact: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside the artifact, which vanishes. What one that was killed left there goes first;
    another that measures there now is waited for."""
    parent = artifact.parent
    folder = parent / WORKPLACE
    try:
        with only_holder(folder.with_suffix(".lock"), _tell_busy):
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(parent).free
            if free < needed_bytes:
                raise FidelityError(
                    f"{parent}: expected {needed_bytes / 1e9:.1f} GB of free disk, found "
                    f"{free / 1e9:.1f} GB; make room, or measure a copy of the artifact elsewhere"
                )
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise FidelityError(
            f"{parent}: expected a folder that can be written, found: {error}; measure a copy of "
            "the artifact elsewhere"
        ) from error


def _tell_busy() -> None:
    warnings.warn("another process measures beside it: waiting for that", stacklevel=2)


def _logits(model: Model, ids: list[int], name: str, progress: bool) -> Iterator[Logits]:
    """The logits [vocab] after each token; a bar tells how far it is."""
    with tqdm(total=len(ids), unit="tok", desc=name, disable=not progress) as bar:
        for piece in model._logits_in_pieces(ids):
            yield from piece
            bar.update(len(piece))


def _write_rows(file: Path, rows: Iterable[Logits]) -> None:
    with file.open("wb") as stream:
        for row in rows:
            stream.write(row.data)


def _read_rows(file: Path, vocab_size: int) -> Iterator[Logits]:
    with file.open("rb") as stream:
        while row := stream.read(vocab_size * np.dtype(np.float32).itemsize):
            yield np.frombuffer(row, np.float32)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in text)
