"""Copy the runtime alone, with libtvm_runtime, for machines without the compiler."""

import os
import shutil
from pathlib import Path

from . import runtime
from .errors import CompileError
from .runtime.devices.tvm_runtime import find_runtime_library
from .runtime.manifest import DEVICES

NAME = "osscompile_runtime"
README = """\
The runtime of osscompile. In the environment that imports it:
    pip install apache-tvm-ffi==0.1.14.post1 numpy tokenizers
(for an OpenCL artifact also pyopencl, for a checkpoint's own chat template jinja2,
to serve fastapi, uvicorn and prometheus_client.)
Then, with the folder above this one on the Python path:
    import osscompile_runtime
    model = osscompile_runtime.load("OUT")
or in that folder:
    python -m osscompile_runtime run OUT              a chat; with a question, its answer
    python -m osscompile_runtime serve OUT            OpenAI's API over HTTP, and a page to chat
    python -m osscompile_runtime inspect OUT          what it is, and the memory that it needs
    python -m osscompile_runtime bench OUT            how fast it is here
    python -m osscompile_runtime.measure DIR          candidates of `osscompile tune --emit DIR`
(Each but the last tells its options with --help. What a CPU's memory and arithmetic would allow,
bench tells only where the full package is, which compiles what measures them.)
"""


def bundle_runtime(directory: Path) -> Path:
    """Write `directory`/osscompile_runtime: a package that loads artifacts of this machine.

    Raises CompileError if it exists or cannot be written, or libtvm_runtime is not installed.
    """
    folder = directory / NAME
    library = find_runtime_library()
    if library is None:
        raise CompileError("bundle: expected an installed apache-tvm, found none; install it")
    if os.path.lexists(folder):
        raise CompileError(f"{folder}: expected a new folder, found one; remove it first")
    source = Path(runtime.__file__).parent
    try:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (library, *map(find_runtime_library, DEVICES)):
            if file is not None:
                shutil.copyfile(file, folder / file.name)
        (folder / "README.txt").write_text(README, encoding="utf-8")
    except BaseException as error:  # also an interrupt: half a bundle would be taken for one
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | ValueError):  # ValueError: a zero byte in the name
            raise CompileError(
                f"{folder}: expected a folder that can be written, found: {error}; choose another"
            ) from error
        raise
    return folder
