"""The memory that `osscompile inspect` says a run needs, against what a run uses."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from artifacts import VARIANTS_HERE
from random_model import random_model, write_checkpoint

import osscompile
from osscompile.importer.graph import weight_parameters
from osscompile.importer.synthetic import synthetic_source
from osscompile.importer.weights import weight_pieces
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.memory import memory_bytes

CONTEXT = 4096

# Fills the context in its own process, and then prints its resident memory.
RUN = """
import sys
import numpy as np
from osscompile.runtime import load
model = load(sys.argv[1], context=int(sys.argv[2]))
ids = np.random.default_rng(0).integers(0, model.vocab_size, model.context - 8).tolist()
print(sum(1 for _ in model.generate(ids, max_tokens=8)))
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(int(line.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def large_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and caches large enough that a few MB of the interpreter do not matter."""
    folder = tmp_path_factory.mktemp("memory")
    config, tensors = random_model(
        layers=4, hidden=512, intermediate=1024, heads=16, kv_heads=8, experts=16, vocab=20_000
    )
    write_checkpoint(folder / "model", config, tensors)
    output = folder / "out"
    return osscompile.compile(
        folder / "model", output=output, variants=VARIANTS_HERE, context=CONTEXT
    )


@pytest.mark.parametrize("context", [1024, CONTEXT])
def test_a_run_uses_the_memory_that_inspect_says(large_artifact: Path, context: int) -> None:
    expected = sum(memory_bytes(read_manifest(large_artifact), context).values())
    command = [sys.executable, "-c", RUN, str(large_artifact), str(context)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, resident = (int(word) for word in result.stdout.split())
    assert tokens == 8
    print(f"inspect {expected / 1e6:.1f} MB, resident {resident / 1e6:.1f} MB")
    assert resident == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["embed.scales", "layers.0.gate_up.words"])
def test_weights_of_20b_are_made_in_pieces(name: str) -> None:
    """The largest tensors of the true size pass through little memory."""
    source = synthetic_source("gpt-oss-20b")
    parameters = weight_parameters(source.config, "fast", 4096)
    parameter = next(p for p in parameters if p.name == name)
    packing = (2, 8) if "gate_up" in name else None
    tracemalloc.start()
    total = sum(make().nbytes for make in weight_pieces(parameter, source, packing))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == np.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize
    assert peak < 250 << 20
