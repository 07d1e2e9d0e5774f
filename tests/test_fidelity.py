"""`measure-fidelity`: what it finds is what the float64 reference says, and nothing is left."""

import dataclasses
import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from artifacts import TINY_OPTIONS, copy_artifact, flip_byte, leave_libraries_empty, reseal
from checkpoints import write_checkpoint
from o200k import RANKS, write_o200k
from random_model import read_checkpoint

import osscompile
from osscompile import cli
from osscompile.errors import CheckpointError
from osscompile.fidelity import measure_fidelity
from osscompile.fidelity.compare import compare_logits
from osscompile.fidelity.text import dialogue_ids
from osscompile.importer.resolve import NANO_CHECKPOINT
from osscompile.importer.synthetic import TINY
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.errors import ArtifactError, InputError
from osscompile.runtime.fidelity import (
    FIDELITY,
    PARTIAL,
    FidelityError,
    read_fidelity,
    write_fidelity,
)
from osscompile.runtime.manifest import MANIFEST, WEIGHTS
from osscompile.runtime.safetensors import read_header
from osscompile.runtime.tokenizer import Tokenizer
from osscompile.targets import Target

measure = importlib.import_module("osscompile.fidelity.measure")
NANO_TOKENIZER = NANO_CHECKPOINT / "tokenizer.json"


@pytest.fixture
def nano(nano_artifact: Path, tmp_path: Path) -> Path:
    return copy_artifact(nano_artifact, tmp_path)


@pytest.fixture
def tiny(tiny_artifact: Path, tmp_path: Path) -> Path:
    return copy_artifact(tiny_artifact, tmp_path)


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*arguments: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(measure, "compile", compile)


@pytest.fixture
def quick(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact artifact is there already."""
    monkeypatch.setattr(measure, "compile", lambda *_, **__: tiny_artifact)


@pytest.fixture
def measured(quick: None, tiny: Path) -> Path:
    measure_fidelity(tiny, "synthetic:tiny", num_tokens=8)
    return tiny


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The measures


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3000.0])
def test_measures_are_those_of_the_reference(scale: float) -> None:
    """Also of logits so steep that most probabilities are zeros."""
    rng = np.random.default_rng(0)
    exact = (scale * rng.standard_normal((40, 500))).astype(np.float32)
    found = exact + 0.3 * rng.standard_normal(exact.shape).astype(np.float32)
    ids = rng.integers(500, size=40).tolist()
    measured = compare_logits(ids, exact, found, str)
    divergences = [reference.kl_divergence(exact[[i]], found[[i]]) for i in range(40)]
    assert measured["mean_kl_divergence"] == pytest.approx(np.mean(divergences))
    assert measured["max_kl_divergence"] == pytest.approx(max(divergences))
    assert measured["max_position"] == 1 + np.argmax(divergences)
    assert measured["agreeing"] == 40 * reference.top1_agreement(exact, found)
    for name, logits in (("exact_loss", exact), ("loss", found)):
        each = reference.log_softmax(logits.astype(np.float64))
        expected = -np.mean([each[i, ids[i + 1]] for i in range(39)])
        assert measured[name] == pytest.approx(expected)


def test_worst_partings_come_first() -> None:
    exact = np.zeros((8, 4), np.float32)
    exact[:, 1] = 1
    found = exact.copy()
    found[1:7, 2] = [2, 7, 3, 5, 4, 6]
    partings = compare_logits([0] * 8, exact, found, lambda id: f"<{id}>")["partings"]
    assert [p.position for p in partings] == [3, 7, 5, 6, 4]
    assert {(p.exact, p.artifact) for p in partings} == {("<1>", "<2>")}


def test_logits_that_are_not_finite() -> None:
    rows = np.zeros((2, 4), np.float32)
    broken = rows.copy()
    broken[1, 3] = np.nan
    with pytest.raises(ArtifactError, match="expected finite numbers, found nan at token 3"):
        compare_logits([0, 1], rows, broken, str)


# The text


def check_dialogue(tokenizer: Tokenizer) -> list[int]:
    ids = dialogue_ids(tokenizer)
    text = tokenizer.decode(ids)
    assert text.startswith("<|start|>system<|message|>") and text.endswith("<|return|>")
    assert "<|start|>functions.get_forecast to=assistant<|channel|>commentary<|message|>" in text
    assert "<|end|><|start|>assistant<|channel|>final<|message|>It looks dry" in text
    for word in ("def since_last_chain", "Wanduhr", "刹车", "बंद", "السبت", "10,800 / 3,600"):
        assert word in text
    return ids


def test_dialogue_in_the_vocabulary_of_nano() -> None:
    check_dialogue(Tokenizer(NANO_TOKENIZER))


@pytest.mark.skipif(RANKS not in os.environ, reason=f"{RANKS} does not name the ranks' folder")
def test_dialogue_fits_what_is_scored_in_the_published_vocabulary(tmp_path: Path) -> None:
    ids = check_dialogue(Tokenizer(write_o200k(tmp_path / "tokenizer.json")))
    assert 1500 < len(ids) <= measure.NUM_TOKENS


# Whole measurements


def test_fast_nano_beside_its_checkpoint(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    assert cli.main(["measure-fidelity", str(nano), "nano", "--tokens", "150"]) == 0
    assert listing(tmp_path) == sorted([*before, f"{nano.name}/{FIDELITY}"])
    printed = capsys.readouterr().out.splitlines()[:5]
    fidelity = read_fidelity(nano)
    assert fidelity is not None and fidelity.tokens == 150 and fidelity.model == "nano"

    ids = dialogue_ids(Tokenizer(NANO_TOKENIZER))[:150]
    logits = osscompile.load(nano).logits(ids)
    judged = reference.Model(*read_checkpoint(NANO_CHECKPOINT)).logits(ids)
    expected = reference.kl_divergence(judged, logits)
    assert fidelity.mean_kl_divergence == pytest.approx(expected, rel=1e-2)
    assert fidelity.agreeing == round(150 * reference.top1_agreement(judged, logits))

    assert cli.main(["inspect", str(nano)]) == 0
    shown = capsys.readouterr().out
    assert all(line.strip() in shown for line in printed)


def test_exact_artifact_is_as_its_checkpoint_until_a_weight_is_wrong(
    tiny: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a tokenizer, whose context ends before the ids do."""
    whole = measure_fidelity(tiny, "synthetic:tiny")
    assert whole.tokens == whole.agreeing == TINY_OPTIONS["context"]
    assert whole.max_kl_divergence < 1e-9 and whole.partings == ()
    assert "random ids" in whole.text
    entry = read_header(tiny / WEIGHTS)["layers.0.router.bias"]
    flip_byte(tiny / WEIGHTS, entry.offset + 3)  # a sign and an exponent
    reseal(tiny)
    monkeypatch.setattr(measure, "compile", lambda *_, **__: tiny_artifact)
    wrong = measure_fidelity(tiny, "synthetic:tiny", num_tokens=64)
    assert wrong.max_kl_divergence > 1e-4
    kept = read_fidelity(tiny)
    assert kept == wrong and kept.manifest_sha256 == read_manifest(tiny).sha256


def test_logits_in_pieces_end_with_another_call(tiny_artifact: Path) -> None:
    model = osscompile.load(tiny_artifact)
    ids = list(range(150))
    np.testing.assert_array_equal(
        np.concatenate([*model._logits_in_pieces(ids)]), model.logits(ids)
    )
    pieces = model._logits_in_pieces(ids)
    next(pieces)
    model.prefill([1, 2, 3])
    with pytest.raises(InputError, match="found a later one"):
        next(pieces)


# What cannot be compared


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 1024}, "vocabulary, found one with 1024"),
    "layers": ({"num_layers": 2, "sliding": (True, False)}, "layers, found one with 2"),
    "window": ({"window": 64}, "window, found one with 64"),
    "order": ({"sliding": TINY.sliding[::-1]}, "sliding layers, found one with"),
    "chosen": ({"num_experts_per_token": 1}, "with 4 experts per token, found one with 1"),
    "eps": ({"norm_eps": 2e-5}, "1e-05 as rms_norm_eps, found one with 2e-05"),
    "clamp": ({"swiglu_limit": 0.05}, "7.0 as swiglu_limit, found one with 0.05"),
    "positions": ({"max_context": 64}, "positions, found one with 64"),
    "theta": (
        {"rope": dataclasses.replace(TINY.rope, theta=9999.0)},
        "position [01], found one with another",
    ),
    "factor": (
        {"rope": dataclasses.replace(TINY.rope, factor=16.0)},
        "position [01], found one with another",
    ),
    "experts": ({"num_experts": 4}, r"numbers in layers\.0\.router\.weight, found one with"),
}


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("other", OTHERS)
def test_model_of_another_shape_is_refused_before_any_work(
    other: str, tiny: Path, tmp_path: Path
) -> None:
    change, message = OTHERS[other]
    model = write_checkpoint(tmp_path / "other", dataclasses.replace(TINY, **change))
    before = listing(tmp_path)
    with pytest.raises(FidelityError, match=f"expected the checkpoint that .*{message}"):
        measure_fidelity(tiny, model)
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("tokens", [1, 0, -5])
def test_too_few_tokens(tiny: Path, tokens: int) -> None:
    with pytest.raises(FidelityError, match=f"tokens: expected at least 2, found {tokens}"):
        measure_fidelity(tiny, "synthetic:tiny", num_tokens=tokens)


@pytest.mark.usefixtures("no_compile")
def test_no_artifact_and_no_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["measure-fidelity", str(tmp_path / "none"), "nano"]) == 1
    assert "expected an artifact" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no such model"):
        measure_fidelity(tiny, tmp_path / "none")


@pytest.mark.usefixtures("no_compile")
def test_artifact_that_cannot_be_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write where the folder says no, so the system says it here."""

    def touch(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", touch)
    message = "expected a folder that can be written, found: Permission denied; measure a copy"
    with pytest.raises(FidelityError, match=message):
        measure_fidelity(tiny, "synthetic:tiny")


@pytest.mark.usefixtures("no_compile")
def test_too_little_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FidelityError, match=r"GB of free disk, found 0\.0 GB; make room"):
        measure_fidelity(tiny, "synthetic:tiny")
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["compile", "compare_logits"])
def test_interrupted_or_failed_measurement_leaves_nothing(
    where: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(tmp_path)
    for cause, raised in ((KeyboardInterrupt, KeyboardInterrupt), (OSError, FidelityError)):

        def fail(*_: object, cause: type[BaseException] = cause, **__: object) -> None:
            assert len(listing(tmp_path)) > len(before)
            raise cause

        monkeypatch.setattr(measure, where, fail)
        with pytest.raises(raised):
            measure_fidelity(tiny, "synthetic:tiny", num_tokens=16)
        assert listing(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_what_a_killed_measurement_left_is_removed(tiny: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    (tmp_path / measure.WORKPLACE).mkdir()
    (tmp_path / measure.WORKPLACE / "logits").write_bytes(bytes(100))
    (tmp_path / f"{measure.WORKPLACE}.lock").touch()
    measure_fidelity(tiny, "synthetic:tiny", num_tokens=8)
    assert listing(tmp_path) == sorted([*before, f"{tiny.name}/{FIDELITY}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["measure-fidelity", "compile", "run"])
def test_ended_by_a_signal(
    command: str,
    number: signal.Signals,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by Ctrl-C: nothing half made is left, and the signal means again what it meant."""
    monkeypatch.setenv("OSSCOMPILE_CACHE", str(tmp_path))
    before = listing(tmp_path)

    def end(*_: object, **__: object) -> None:
        assert signal.getsignal(number) != former  # else it would end the tests
        signal.raise_signal(number)

    former = signal.getsignal(number)
    monkeypatch.setattr(measure, "compile", end)
    monkeypatch.setattr(importlib.import_module("osscompile.compiler"), "compile", end)
    arguments = [str(tiny), "synthetic:tiny"] if command == "measure-fidelity" else ["nano"]
    assert cli.main([command, *arguments]) == 130
    assert listing(tmp_path) == before and signal.getsignal(number) == former


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_file_is_whole_or_as_it_was(
    cause: Any, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity, before = read_fidelity(measured), listing(measured)
    assert fidelity is not None

    def fail(*arguments: object) -> None:
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt if cause is KeyboardInterrupt else FidelityError):
            write_fidelity(measured, dataclasses.replace(fidelity, model="other"))
    assert listing(measured) == before and read_fidelity(measured) == fidelity


# The file


def test_compiling_again_forgets_what_was_measured(
    tmp_path: Path, this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_libraries_empty(monkeypatch)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
            out = osscompile.compile(
                "synthetic:tiny", this_machine.name, tmp_path / "out", **TINY_OPTIONS
            )
        assert not {FIDELITY, PARTIAL} & set(os.listdir(out))
        (out / FIDELITY).write_text("old")
        (out / PARTIAL).write_text("of one that was killed")


def change(**fields: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | fields)


DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "cut_off": (lambda text: text[:50], "measure again"),
    "empty": (lambda text: "", "measure again"),
    "large": (lambda text: " " * (65 << 10) + text, "more than 65536 bytes"),
    "deep": (lambda text: "[" * 60000, "measure again"),
    "list": (lambda text: "[]", "an object with"),
    "more": (change(colour="red"), "found also 'colour'"),
    "escape": (change(model="\x1b[2J"), "a text that can be printed"),
    "not_a_number": (change(mean_kl_divergence=float("nan")), "found nan"),
    "infinite": (change(max_kl_divergence=float("inf")), "found inf"),
    "negative": (change(loss=-1.0), "a number from 0"),
    "no_tokens": (change(tokens=0, agreeing=0), "0 of 0 tokens"),
    "more_than_all": (change(agreeing=10**6), "tokens that agree"),
    "half_a_parting": (change(partings=[{"position": 1}]), "an item of partings"),
    "other_artifact": (change(manifest_sha256="0" * 64), "of another compile; measure again"),
    "steep": (change(loss=1e9), "above 1e304"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_inspect_of_a_damaged_file(
    damage: str, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = measured / FIDELITY
    spoil, message = DAMAGED[damage]
    file.write_text(spoil(file.read_text()))
    assert cli.main(["inspect", str(measured)]) == 0
    osscompile.load(measured)  # which does not look at it
    out = capsys.readouterr().out
    assert message in out and "\nfiles\n" in out and "\x1b" not in out


def test_artifact_that_was_never_measured(
    tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tiny_artifact)]) == 0
    assert "fidelity: not measured; `osscompile measure-fidelity" in capsys.readouterr().out
    assert FIDELITY not in json.loads((tiny_artifact / MANIFEST).read_text())["files"]
