"""Far machines over TVM's RPC; a tracker and a server on this machine stand for one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cuda import image as image  # a fixture
from test_tuning_devices import planned as planned
from treacherous_kernel import CRASHES, FAST, KNOB, SLOW, WRONG, emit_tiny, measured_ways
from treacherous_kernel import offer as offer

from osscompile import cli
from osscompile import remote as remote_module
from osscompile.bench import bandwidth
from osscompile.errors import RemoteError
from osscompile.remote import Remote, parse_remote
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.bench.report import read_reports
from osscompile.runtime.trials.measure import measure_kernel
from osscompile.targets import Target
from osscompile.tuning.far import attempt_there
from osscompile.tuning.records import read_findings

pytest.importorskip("tornado", reason="TVM's RPC needs tornado: install the extra `rpc`")
START_SECONDS = 60


@pytest.fixture(scope="module")
def tracker() -> Iterator[Remote]:
    with a_tracker() as remote:
        yield remote


@contextmanager
def a_tracker() -> Iterator[Remote]:
    """Start a tracker that knows one server, with the key "far"."""
    processes = []

    def start(name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"tvm.exec.{name}", "--host", "127.0.0.1", *arguments]
        processes.append(
            subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        remote = Remote("127.0.0.1", free.getsockname()[1], "far")
    try:
        start("rpc_tracker", "--port", str(remote.port), "--port-end", str(remote.port + 1))
        server = ("--port", "9190", "--port-end", "9990", "--key", remote.key)
        start("rpc_server", *server, "--tracker", f"{remote.host}:{remote.port}")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                remote.session(10)
                break
            except RemoteError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield remote
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # and the workers that it started
            process.wait()


def test_tune(this_machine: Target, offer, tracker: Remote, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A candidate that is wrong on the far machine does not win."""
    offer(SLOW, WRONG, FAST)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    told: list[str] = []
    measure_kernel(folder, attempt_there(tracker), report=told.append)
    assert measured_ways(folder) == {FAST}
    (finding,) = read_findings([folder], this_machine)
    assert finding.constants == {KNOB: FAST} and finding.ratio < 0.9
    assert len(told) == 1 and f"{{'{KNOB}': {WRONG}}}" in told[0] and "wrong: off by" in told[0]


def test_tune_command(this_machine: Target, offer, tracker: Remote, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    offer(SLOW, FAST)
    emit_tiny(tmp_path / "emitted", this_machine)
    where = ["--rpc", f"{tracker.host}:{tracker.port}", "--key", tracker.key]
    assert cli.main(["tune", "--measure", str(tmp_path / "emitted"), *where]) == 0
    (folder,) = (tmp_path / "emitted").glob("*/results.json")
    assert measured_ways(folder.parent) == {FAST}


def test_candidate_that_crashes_ends_the_server_of_tvm(  # type: ignore[no-untyped-def]
    this_machine: Target, offer, tmp_path: Path
) -> None:
    """The error names the candidate, and says how to go on."""
    offer(SLOW, CRASHES, FAST)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    with a_tracker() as remote:
        with pytest.raises(RemoteError, match=rf"{{'{KNOB}': {CRASHES}}} ended.*start it"):
            measure_kernel(folder, attempt_there(remote))


def test_bench(
    tiny_artifact: Path, tracker: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "READ_BYTES", 1 << 24)
    file = tmp_path / "far.json"
    arguments = ["bench", str(tiny_artifact), "--prefill", "16,40", "--decode", "0,32"]
    where = ["--rpc", f"{tracker.host}:{tracker.port}", "--key", tracker.key]
    assert cli.main([*arguments, *where, "--json", str(file)]) == 0
    (report,) = read_reports(file)
    assert report.cpu == str(tracker) and report.cores is None and report.resident_bytes is None
    assert list(report.prefill) == [16, 40] and list(report.decode) == [0, 32]
    assert report.bandwidth >= max(report.bandwidth_at.values()) > 0
    assert report.variant in [v.name for v in read_manifest(tiny_artifact).variants]


# Mistakes


def test_address_and_key() -> None:
    assert parse_remote("phone:9190", "k") == Remote("phone", 9190, "k")
    for address in ("phone", ":9190", "phone:", "phone:x", "phone:0", "phone:65536"):
        with pytest.raises(RemoteError, match="expected HOST:PORT of a tracker, found"):
            parse_remote(address, "k")
    with pytest.raises(RemoteError, match="expected --key K too"):
        parse_remote("phone:9190", None)
    with pytest.raises(RemoteError, match="--key: expected --rpc"):
        parse_remote(None, "k")
    assert parse_remote(None, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tune", "--emit", "never", "--rpc", "phone:1", "--key", "k"],
            "--emit: expected no --rpc",
        ),
        (["tune", "--ingest", "never", "--rpc", "phone:1", "--key", "k"], "--ingest: expected no"),
        (["tune", "--key", "k"], "--key: expected --rpc"),
        (["bench", "never", "--key", "k"], "--key: expected --rpc"),
        (["bench", "never", "--rpc", "phone:1"], "expected --key K too"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_kernels_of_a_device_are_not_sent(planned: Path) -> None:
    """TVM's server could not launch these kernels."""
    far = Remote("127.0.0.1", 1, "far")
    with pytest.raises(RemoteError, match=r"found those of cuda.*measure it without --rpc"):
        measure_kernel(planned, attempt_there(far))


def test_no_tracker() -> None:
    with socket.socket() as bound:  # but it does not listen
        bound.bind(("127.0.0.1", 0))
        remote = Remote("127.0.0.1", bound.getsockname()[1], "far")
        with pytest.raises(RemoteError, match=r"expected a tracker of TVM's RPC, found: .*start"):
            remote.session(10)


def test_no_server_of_that_key(tracker: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WAIT_SECONDS", 0.5)
    with pytest.raises(RemoteError, match=r"expected a server of that key.*--key other"):
        Remote(tracker.host, tracker.port, "other").session(10)
