"""Artifacts that cannot be used raise an error of ours before any of their code runs. It says what
was expected, what was found and what to do."""

import _json
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import copy_artifact, flip_byte, library_is_loaded, reseal

import osscompile
from osscompile.errors import CompileError
from osscompile.runtime import artifact as artifact_module
from osscompile.runtime.artifact import mark_verified, read_manifest
from osscompile.runtime.errors import ArtifactError, InputError
from osscompile.runtime.manifest import MANIFEST, TOKENIZER, WEIGHTS

FILES = [MANIFEST, "library", WEIGHTS, TOKENIZER]


@pytest.fixture
def copy(nano_artifact: Path, tmp_path: Path) -> Path:
    return copy_artifact(nano_artifact, tmp_path)


def file_of(artifact: Path, name: str) -> Path:
    """Return a file of the artifact; `library` is the one that would be loaded."""
    if name != "library":
        return artifact / name
    variant = read_manifest(artifact).variant_here()
    assert variant is not None
    return artifact / variant.library


def add_variant(artifact: Path) -> Path:
    """Add a variant, the last, that no CPU can run; returns its library."""
    library = file_of(artifact, "library")
    other = shutil.copyfile(library, artifact / f"other{library.suffix}")

    def change(fields: dict[str, Any]) -> None:
        variant = {"name": "other", "cpu_features": ["avx1024"], "library": other.name}
        fields["variants"].append(variant)
        fields["files"][other.name] = fields["files"][library.name]

    reseal(artifact, change)
    return other


def refuse(artifact: Path, *words: str) -> None:
    """Loading must fail with all these words in the message, and without loading the library."""
    with pytest.raises(ArtifactError) as caught:
        osscompile.load(artifact)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not library_is_loaded(artifact)


# Damaged


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_flipped_byte(copy: Path, name: str, position: str) -> None:
    file = file_of(copy, name)
    size = file.stat().st_size
    flip_byte(file, {"first": 0, "middle": size // 2, "last": size - 1}[position])
    refuse(copy, str(file), "expected", "found", "copy it again, or compile the model again")


def test_flipped_byte_anywhere_in_the_manifest(copy: Path) -> None:
    file = copy / MANIFEST
    whole = file.read_bytes()
    for position in range(0, len(whole), 29):
        flip_byte(file, position)
        with pytest.raises(ArtifactError, match=MANIFEST):
            read_manifest(copy)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy: Path, name: str) -> None:
    file = file_of(copy, name)
    file.unlink()
    refuse(copy, file.name, "expected", "found no")


@pytest.mark.parametrize("left", [0, 1, 7, 4096, -2])
@pytest.mark.parametrize("name", FILES)
def test_truncated_file(copy: Path, name: str, left: int) -> None:
    file = file_of(copy, name)
    file.write_bytes(file.read_bytes()[:left])
    refuse(copy, str(file), "expected", "found")


def test_file_with_one_byte_more(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    size = read_manifest(copy).files[WEIGHTS].num_bytes
    refuse(copy, f"expected {size} bytes", f"found {size + 1} bytes")


def test_folder_in_place_of_a_file(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).mkdir()
    refuse(copy, str(copy / WEIGHTS), "damaged or incomplete")


def test_unreadable_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the file is made to fail: permissions do not stop root, who may run the tests."""
    open_path = Path.open

    def refuse_weights(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(self))
        return open_path(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse_weights)
    refuse(copy, "Permission denied", WEIGHTS, "check their permissions")


def test_large_weights_changed_after_they_were_verified(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "ALWAYS_HASHED_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mark_verified(copy / WEIGHTS, read_manifest(copy).files[WEIGHTS].sha256)
    flip_byte(copy / WEIGHTS, -100)
    refuse(copy, WEIGHTS, "sha256")


def test_not_an_artifact(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing", copy / MANIFEST, copy / WEIGHTS):
        refuse(
            path, str(path), "expected an artifact, found no manifest.json", "osscompile compile"
        )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"format_version"', "[" * 100_000])
def test_manifest_is_no_json_object(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    refuse(copy, MANIFEST, "format_version", "damaged")


# Whole, but not for us


@pytest.mark.parametrize("version", [0, 6, 8, "7", None, [7]])
def test_other_format_version(copy: Path, version: object) -> None:
    """Another version is told apart from damage: no other field is read."""
    fields = {"format_version": version, "something": "new"}
    (copy / MANIFEST).write_text(json.dumps(fields))
    refuse(copy, f"expected format version 7, found {version!r}", "compile the model again")


def test_cpu_features_that_this_machine_lacks(copy: Path) -> None:
    """The error names those of every variant, since one that needs less would have been taken."""
    add_variant(copy)

    def change(fields: dict[str, Any]) -> None:
        for variant in fields["variants"]:
            variant["cpu_features"] = ["popcnt", f"more for {variant['name']}"]

    reseal(copy, change)
    needs = [
        f"{v.name} needs popcnt, more for {v.name}; this one lacks more for {v.name}"
        for v in read_manifest(copy).variants
    ]
    refuse(copy, *needs, "compile the model for", "osscompile targets")


def test_missing_library_of_a_variant_for_other_machines(copy: Path) -> None:
    """The artifact is not whole: it would fail on those machines."""
    other = add_variant(copy)
    assert other != file_of(copy, "library")
    other.unlink()
    refuse(copy, other.name, "expected a file", "damaged or incomplete")


def test_other_system(copy: Path) -> None:
    reseal(copy, lambda fields: fields.update(system="Plan9"))
    refuse(copy, "made for Plan9", f"this machine is {platform.system()}", "compile the model for")


def test_other_architecture(copy: Path) -> None:
    reseal(copy, lambda fields: fields.update(architecture="m68k"))
    refuse(copy, "on m68k", platform.machine(), "compile the model for")


def test_other_machine_is_told_before_damage(copy: Path) -> None:
    reseal(copy, lambda fields: fields.update(architecture="m68k"))
    flip_byte(copy / WEIGHTS, -1)
    refuse(copy, "m68k")


# Sealed with right hashes, but wrong inside


def rewrite_header(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights; sizes and hashes are right afterwards."""
    file = artifact / WEIGHTS
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    reseal(artifact)


def last_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return max(header.values(), key=lambda entry: entry["data_offsets"])


def test_weights_with_an_offset_outside_the_file(copy: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = last_tensor(header)
        entry["data_offsets"] = [offset + (1 << 40) for offset in entry["data_offsets"]]

    rewrite_header(copy, change)
    refuse(copy, WEIGHTS, "ends at byte", "the file at")


def test_weights_with_a_size_outside_the_file(copy: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = last_tensor(header)
        begin, end = entry["data_offsets"]
        entry.update(dtype="U8", shape=[end - begin + 64], data_offsets=[begin, end + 64])

    rewrite_header(copy, change)
    refuse(copy, WEIGHTS, "ends at byte", "cut off")


def test_weights_with_negative_offsets(copy: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = last_tensor(header)
        entry["data_offsets"] = [offset - (1 << 40) for offset in entry["data_offsets"]]

    rewrite_header(copy, change)
    refuse(copy, WEIGHTS, "expected [begin, end] as data_offsets")


def test_weights_that_overlap(copy: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
        second.update(first)

    rewrite_header(copy, change)
    refuse(copy, WEIGHTS, "overlaps")


def test_weights_header_longer_than_the_file(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    reseal(copy)
    refuse(copy, WEIGHTS, f"the header claims {1 << 62} bytes")


def test_weights_not_aligned(copy: Path) -> None:
    """A kernel would crash on them."""
    content = (copy / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * 4
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    reseal(copy)
    refuse(copy, WEIGHTS, "at a multiple of 64")


def test_weights_without_a_tensor(copy: Path) -> None:
    name = read_manifest(copy).weights[3].name
    rewrite_header(copy, lambda header: header.update({"renamed": header.pop(name)}))
    refuse(copy, WEIGHTS, f"expected {name}", "found none")


def test_weights_of_another_shape(copy: Path) -> None:
    name = read_manifest(copy).weights[0].name
    rewrite_header(copy, lambda header: header[name]["shape"].reverse())
    refuse(copy, WEIGHTS, f"expected {name}")


def test_weights_of_another_dtype(copy: Path) -> None:
    """They have as many bytes: the kernels would read them as what they are not."""
    name = read_manifest(copy).weights[0].name
    rewrite_header(copy, lambda header: header[name].update(dtype="I32"))
    refuse(copy, WEIGHTS, f"expected {name} as float32", "found int32")


def test_weights_cut_off_and_sealed(copy: Path) -> None:
    file = copy / WEIGHTS
    file.write_bytes(file.read_bytes()[:-64])
    reseal(copy)
    refuse(copy, WEIGHTS, "cut off")


def test_library_that_is_no_library(copy: Path) -> None:
    file_of(copy, "library").write_bytes(b"\x7fELF and nothing else")
    reseal(copy)
    refuse(copy, "expected a library that this machine can load", "compile the model again")


def test_library_without_our_entry(copy: Path) -> None:
    other = getattr(_json, "__file__", None)
    if other is None:
        pytest.skip("this Python has no extension module to take for a library")
    shutil.copyfile(other, file_of(copy, "library"))
    reseal(copy)
    with pytest.raises(ArtifactError, match="expected a library that this machine can load"):
        osscompile.load(copy)


def test_tokenizer_without_the_special_tokens(copy: Path) -> None:
    fields = json.loads((copy / TOKENIZER).read_text())
    fields["added_tokens"] = []
    (copy / TOKENIZER).write_text(json.dumps(fields))
    reseal(copy)
    refuse(copy, TOKENIZER, "expected the special tokens of gpt-oss")


@pytest.mark.parametrize("field", ["system", "variants", "weights", "files", "context", "caches"])
def test_manifest_without_a_field(copy: Path, field: str) -> None:
    reseal(copy, lambda fields: fields.pop(field))
    refuse(copy, MANIFEST, field, "damaged")


def test_manifest_with_an_unknown_field(copy: Path) -> None:
    reseal(copy, lambda fields: fields.update(surprise=1))
    refuse(copy, MANIFEST, "surprise")


@pytest.mark.parametrize("field", ["variants", "weights", "files", "caches", "sliding"])
def test_manifest_with_a_number_where_more_is_due(copy: Path, field: str) -> None:
    reseal(copy, lambda fields: fields.update({field: 7}))
    refuse(copy, MANIFEST, "damaged")


@pytest.mark.parametrize("name", ["../lib.so", "/tmp/lib.so", "..", ""])
def test_manifest_that_leads_out_of_the_folder(copy: Path, name: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        (variant,) = fields["variants"]
        fields["files"][name] = fields["files"].pop(variant["library"])
        variant["library"] = name

    shutil.copyfile(file_of(copy, "library"), copy.parent / "lib.so")
    reseal(copy, change)
    refuse(copy, "damaged")


@pytest.mark.parametrize("number", [0, 1], ids=["that would run", "of another variant"])
def test_manifest_that_does_not_list_a_library(copy: Path, number: int) -> None:
    add_variant(copy)
    reseal(copy, lambda fields: fields["files"].pop(fields["variants"][number]["library"]))
    refuse(copy, MANIFEST, "expected an entry for")


def test_manifest_without_variants(copy: Path) -> None:
    reseal(copy, lambda fields: fields.update(variants=[]))
    refuse(copy, MANIFEST, "expected at least one variant", "damaged")


@pytest.mark.parametrize("field", ["name", "cpu_features", "library"])
def test_manifest_with_half_a_variant(copy: Path, field: str) -> None:
    reseal(copy, lambda fields: fields["variants"][-1].pop(field))
    refuse(copy, MANIFEST, field, "damaged")


def test_a_damaged_artifact_can_be_compiled_again(copy: Path) -> None:
    """The advice of the messages works."""
    from osscompile.write import staged_directory

    for name in FILES[::-1]:
        flip_byte(copy / MANIFEST if name == MANIFEST else file_of(copy, name), 0)
    with staged_directory(copy, 0) as folder:
        (folder / MANIFEST).write_text("new")
    assert [path.name for path in copy.iterdir()] == [MANIFEST]


# All of the above


def test_errors_are_one_family() -> None:
    """One `except osscompile.OsscompileError` catches all errors that users can cause."""
    for error in (ArtifactError, InputError, CompileError):
        assert issubclass(error, osscompile.OsscompileError)


def test_a_whole_artifact_has_its_library_loaded(nano_artifact: Path) -> None:
    """Otherwise `refuse` would prove nothing."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    model = osscompile.load(nano_artifact)
    assert library_is_loaded(nano_artifact)
    del model
    assert not library_is_loaded(nano_artifact)
