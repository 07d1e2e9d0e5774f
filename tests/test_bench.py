"""`osscompile bench`: its figures are there and count what they say. No test asserts a speed."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from artifacts import TINY_OPTIONS

import osscompile
from osscompile import cli
from osscompile.bench import bandwidth, int8
from osscompile.bench.limits import LIMITS
from osscompile.compiler import GATHERED, decode_bytes
from osscompile.importer.graph import cache_parameters, weight_parameters
from osscompile.importer.synthetic import TINY, gpt_oss_config
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.bench import machine, models
from osscompile.runtime.bench.artifact import kv_bytes, token_macs
from osscompile.runtime.bench.models import bench
from osscompile.runtime.bench.report import read_reports, table
from osscompile.runtime.manifest import Manifest, Tensor
from osscompile.runtime.model import Model
from osscompile.targets import Target

# Facts of an artifact


def test_kv_bytes_of_gpt_oss_20b(tiny_artifact: Path) -> None:
    """Keys and values of 8 heads x 64 float16 are 2 KiB; 12 layers are full, 12 slide."""
    assert kv_bytes(manifest_of_20b(tiny_artifact, "fast")) == (12 * 2048, 12 * 2048)


@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_token_macs_of_gpt_oss_20b(tiny_artifact: Path, profile: str) -> None:
    """qkv 5120 x 2880, out 2880 x 4096, router 32 x 2880, 4 experts of 3 x 2880 x 2880."""
    layer = 5120 * 2880 + 2880 * 4096 + 32 * 2880 + 4 * 3 * 2880 * 2880
    assert token_macs(manifest_of_20b(tiny_artifact, profile)) == 24 * layer


def manifest_of_20b(other: Path, profile: str) -> Manifest:
    """Return a manifest with the tensors of 20b; all other fields are another artifact's."""
    config = gpt_oss_config(num_layers=24, num_experts=32)
    tensors = weight_parameters(config, profile, 64), cache_parameters(config, profile)
    weights, caches = (tuple(Tensor(p.name, p.shape, p.dtype) for p in part) for part in tensors)
    return dataclasses.replace(
        read_manifest(other),
        sliding=config.sliding,
        caches=caches,
        weights=weights,
        gathered=tuple(w.name for w in weights if w.name.startswith(GATHERED)),
        decode_bytes=decode_bytes(config, weights),
    )


# Measuring


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's limits in little time, since no test looks at them."""
    monkeypatch.setattr(bandwidth, "READ_BYTES", 1 << 24)


@pytest.mark.usefixtures("quick")
def test_report_of_a_small_model(tiny_artifact: Path) -> None:
    stages: list[str] = []
    with pytest.warns(UserWarning, match=r"left out prefill 10000, decode at 10000: .*256"):
        report = bench(tiny_artifact, (16, 10_000), (0, 32, 10_000), stages.append, LIMITS)
    assert list(report.prefill) == [16]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 32]
    assert report.bandwidth >= max(report.bandwidth_at.values()) > 0
    for timing in (*report.prefill.values(), *report.decode.values()):
        assert 0 < timing.fastest <= timing.median <= timing.slowest
    assert "prefill 16" in stages and "decode at 32" in stages and "prefill 10000" not in stages
    assert 0 < report.load_seconds < report.first_token_seconds
    assert report.outside_share is not None and 0 < report.outside_share < 1
    manifest = read_manifest(tiny_artifact)
    assert report.weight_bytes == manifest.decode_bytes
    assert report.manifest_sha256 in (tiny_artifact / "manifest.json").read_text()
    # TINY: qkv 640 rows, out 512 inputs, 8 experts of which 4 are used; 2 x 2 heads of 32 float32
    layer = 640 * 64 + 64 * 512 + 8 * 64 + 4 * 3 * 64 * 96
    assert report.token_macs == TINY.num_layers * layer
    assert report.full_kv_bytes == report.sliding_kv_bytes == 2 * 2 * 2 * 32 * 4


@pytest.mark.usefixtures("quick")
def test_cache_of_each_depth_is_filled_once(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deepest is filled first, to save memory and time; the report keeps the asked order."""
    filled: list[int] = []
    fill = models._fill_cache

    def counted(model: Model, ids: list[int]) -> None:
        filled.append(len(ids))
        fill(model, ids)

    monkeypatch.setattr(models, "_fill_cache", counted)
    report = bench(tiny_artifact, (), (0, 64, 64, 32), limits=LIMITS)
    assert filled == [64, 32, 0]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 64, 32]


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:.* has no tokenizer.json")
def test_context_too_short_to_measure_anything(this_machine: Target, tmp_path: Path) -> None:
    options = TINY_OPTIONS | {"context": 1}
    short = osscompile.compile("synthetic:tiny", this_machine.name, tmp_path / "s.osc", **options)
    with pytest.warns(UserWarning, match="left out prefill 16, "):
        report = bench(short, limits=LIMITS)
    assert report.prefill == {} and report.decode == {} and report.outside_share is None
    assert "decode" not in table(report)


def test_int8_loop_does_the_products_that_are_counted(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of every chain adds, lane by lane, the products of 4 bytes of each vector."""
    if this_machine.int8_dot not in int8.LOOPS:
        pytest.skip("no loop for this machine's int8 instruction")
    monkeypatch.setattr(int8, "STEPS", 3)
    loop, lanes = int8.LOOPS[this_machine.int8_dot], this_machine.register_bits // 32
    weights = np.random.default_rng(0).integers(0, 25, (loop.vectors, lanes * 4), dtype=np.uint8)
    expected = np.repeat(np.arange(loop.chains, dtype=np.int32), lanes)
    for _ in range(3):
        x = np.repeat(weights[None], loop.chains, axis=0)
        if this_machine.int8_dot == "maddubs":
            x = expected.view(np.int8).reshape(loop.chains, 1, lanes * 4)
        products = x.astype(np.int32) * weights
        expected = expected + products.sum(axis=1).reshape(-1, 4).sum(axis=1, dtype=np.int32)
    target = tvm.target.Target(this_machine.tvm)
    sums = tvm.runtime.tensor(np.zeros_like(expected))
    module = int8._module(loop, lanes)
    tvm.compile(module, target=target)["main"](tvm.runtime.tensor(weights), sums)
    np.testing.assert_array_equal(sums.numpy(), expected)


def test_bandwidth_loop_reads_everything(this_machine: Target) -> None:
    shape = (3, 40, bandwidth.LANES)  # small, so that it fetches beyond the end
    data = np.random.default_rng(0).integers(0, 1 << 32, shape, dtype=np.uint32)
    sums = tvm.runtime.tensor(np.zeros((3, bandwidth.LANES), np.uint32))
    target = tvm.target.Target(this_machine.tvm)
    for distance in bandwidth.PREFETCH_BYTES:
        module = bandwidth.read_module(distance, *shape[:2])
        tvm.compile(module, target=target)["read"](tvm.runtime.tensor(data), sums)
        np.testing.assert_array_equal(sums.numpy(), data.sum(axis=1, dtype=np.uint32))


def test_other_processes_are_seen_and_our_own_are_not() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not tell")
    cores = os.cpu_count() or 1
    seconds = 1.1 * machine.LEAST_CPU_SECONDS / cores
    own = machine.OtherProcesses()
    spin(seconds)
    alone = own.share()
    code = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = machine.OtherProcesses()
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(cores)]
    time.sleep(seconds)
    busy = others.share()
    for process in processes:
        process.kill()
        process.wait()
    assert alone is not None and busy is not None and busy > 0.3
    assert alone < busy  # others may also run


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.source_commit() is None


def test_commit_of_a_checkout_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.source_commit() is None


# The command


def test_command_measures_two_and_compares_them(
    tiny_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, sizes = tmp_path / "figures.json", ["--prefill", "16", "--decode", "0"]
    assert cli.main(["bench", *[str(tiny_artifact)] * 2, *sizes, "--json", str(file)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("read bandwidth") == 2 and "of roofline" in printed
    first, second = read_reports(file)
    # each model has its own process, so that the second's peak is not the sum of both
    assert first.peak_bytes and second.peak_bytes and second.peak_bytes < 1.5 * first.peak_bytes
    assert cli.main(["bench", "--compare", str(file), "--plot", str(tmp_path / "p.png")]) == 0
    assert "decode at 0, tok/s" in capfd.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected artifacts or --compare"),
        (["{artifact}", "--compare", "x.json"], "found both"),
        (["{artifact}", "{tmp}/none.osc"], "none.osc: expected an artifact"),
        (["{artifact}", "--json", "{tmp}/none/r.json"], "expected a file that can be written"),
        (["{artifact}", "--plot", "{tmp}"], "expected a file that can be written"),
        (["--compare", "{tmp}/none.json"], "none.json: expected reports"),
    ],
)
def test_mistakes_are_told_before_measuring(
    arguments: list[str],
    message: str,
    tiny_artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "ProcessPoolExecutor", None)  # nothing is measured
    filled = [part.format(artifact=tiny_artifact, tmp=tmp_path) for part in arguments]
    assert cli.main(["bench", *filled]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(
    tiny_artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", str(tiny_artifact), "--plot", "never.png"]) == 1
    printed = capsys.readouterr()
    assert "pip install 'osscompile[plot]'" in printed.err and printed.out == ""


# tests/bench, which runs only when asked for


def test_kernel_benchmarks_run() -> None:
    """Some of them run once; their figures do not matter here."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    some = "decode and (embed or attention_sliding or moe_down or sort_by_expert)"
    folder = Path(__file__).parent
    result = subprocess.run([*command, "-k", some], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout
