"""Options and fixtures that several test files share."""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

# Set before numpy loads: threads of OpenBLAS slow the reference's small matrix products 5 times.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from artifacts import TINY_OPTIONS
from opencl_device import OPENCL
from talker import compile_talker

import osscompile
from osscompile import compiler, targets
from osscompile.locks import only_holder
from osscompile.targets import Target
from osscompile.tuning import workloads

# Nothing changes a graph: a process builds each once.
build_graph = lru_cache(maxsize=16)(compiler.build_graph)
compiler.build_graph = workloads.build_graph = build_graph
compiler.with_choose = workloads.with_choose = lru_cache(maxsize=16)(compiler.with_choose)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the files under tests/golden that tests compare with, instead of comparing",
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use a process a core for the whole suite, since most of a compile is one thread's work. For
    more than four there are too few long files. Tests named on the command line run in this
    process, because speeds (tests/bench) are measured alone."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if whole else 0


# Files that take a minute or more. They go first, so that the processes end together.
LONGEST = ("test_metal", "test_opencl", "test_cuda", "test_tuning_checks", "test_aarch64")
LONGEST += ("test_kernels_gpu", "test_readme", "test_metal_tuning", "test_tuning", "test_cuda_here")
LONGEST += ("test_tuning_devices", "test_variants", "test_runtime_alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # the others stay in their order


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def this_machine() -> Target:
    """The target that runs here; tests that run artifacts skip if there is none."""
    try:
        return targets.of_this_machine()
    except targets.TargetError as error:
        pytest.skip(str(error))


Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Give a path of that name, which the first of this run's processes that asks has made."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        output = folder / "shared" / name
        output.parent.mkdir(parents=True, exist_ok=True)
        with only_holder(output.with_suffix(".lock"), lambda: None):
            if not output.exists():
                make(output)
        return output

    return get


@pytest.fixture(scope="session")
def tiny_artifact(this_machine: Target, shared: Shared) -> Path:
    """A random model without a tokenizer, compiled in seconds. Copy it before you change it."""

    def make(output: Path) -> None:
        with warnings.catch_warnings(action="ignore"):  # it has no tokenizer, which is its purpose
            osscompile.compile("synthetic:tiny", this_machine.name, output, **TINY_OPTIONS)

    return shared("tiny.osc", make)


@pytest.fixture(scope="session")
def nano_artifact(this_machine: Target, shared: Shared) -> Path:
    """The model that ships, in the default profile. Copy it before you change it."""
    name, variants = this_machine.name, [this_machine.variant]
    return shared(
        "nano.osc",
        lambda output: osscompile.compile("nano", name, output, variants=variants, context=4096),
    )


@pytest.fixture(scope="session")
def nano_opencl(shared: Shared) -> Path:
    """The same for OpenCL. All tests take this one, so that PoCL compiles its kernels once."""
    return shared(
        "nano-opencl.osc",
        lambda output: osscompile.compile("nano", OPENCL.name, output, context=1024),
    )


@pytest.fixture(scope="session")
def talker(this_machine: Target, shared: Shared) -> Path:
    return shared(
        "talker/talker.osc", lambda output: compile_talker(this_machine.name, output.parent)
    )
