"""Run kernels under emulation: for each path of a library on stdin, call its `main` with the arrays
of the .npz beside it, write them back, and say so."""

import sys
from pathlib import Path

import numpy as np
from osscompile_runtime.devices.tvm_cpu import aligned_copy, tensor
from osscompile_runtime.devices.tvm_runtime import load_function

THREADS = 2

for line in sys.stdin:
    library = Path(line.rstrip("\n"))
    with np.load(library.with_suffix(".npz")) as arguments:
        arrays = [aligned_copy(arguments[name]) for name in arguments.files]
    load_function(library, "main", THREADS)(*map(tensor, arrays))
    np.savez(library.with_suffix(".npz"), *arrays)
    print("done", flush=True)
