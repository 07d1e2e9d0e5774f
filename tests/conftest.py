"""Options and fixtures that several test files share."""

import os

# Before numpy: threads of OpenBLAS make the small matrix products of the reference 5 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402

from osscompile import targets  # noqa: E402
from osscompile.targets import Target  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the files under tests/golden that tests compare with, instead of comparing",
    )


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def x86() -> Target:
    return targets.load("x86")
