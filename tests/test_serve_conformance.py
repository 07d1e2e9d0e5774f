"""The server before judges that others wrote."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from serving import serving

from osscompile.runtime import Engine
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.service import make_service

# Tests of llm-comply that fail, and why.
EXCEPTIONS = {
    "openai-chat": {
        "chat-image-input": "gpt-oss reads text only, and an image is refused",
    },
    "open-responses": {
        "image-input": "gpt-oss reads text only, and an image is refused",
    },
}
# OpenAI's own client knows the reasoning of gpt-oss by this name, Open Responses by another.
EVENTS = "response.reasoning_text"


@pytest.fixture(scope="module")
def url(nano_artifact: Path) -> Iterator[str]:
    """A server of nano, which says the same every time unless it is asked otherwise."""
    with Engine(nano_artifact, context=256) as engine:
        engine.submit = partial(engine.submit, temperature=0)  # type: ignore[method-assign]
        with serving(make_app(make_service(engine, "nano", 100))) as url:
            yield url


@pytest.mark.parametrize("suite", EXCEPTIONS)
def test_llm_comply(url: str, suite: str) -> None:
    if importlib.util.find_spec("llm_comply") is None:
        pytest.skip("needs llm-comply")
    command = [sys.executable, "-m", "llm_comply.cli", "--format", suite, "-u", f"{url}/v1"]
    options = ["-k", "none", "-m", "nano", "-i", EVENTS, "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    report = json.loads(result.stdout)
    failed = {
        test["id"]: test["errors"] for test in report["results"] if test["status"] == "failed"
    }
    assert failed.keys() == EXCEPTIONS[suite].keys(), failed


@pytest.mark.parametrize(
    ("phases", "examples"),
    [("fuzzing", 20), pytest.param("coverage,fuzzing", 300, marks=pytest.mark.long)],
)
def test_no_request_that_fits_the_description_fails_the_server(
    url: str, phases: str, examples: int, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    options = ["--checks", "not_a_server_error", "--max-examples", str(examples), "--no-color"]
    options += ["--phases", phases, "--generation-deterministic"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:]
