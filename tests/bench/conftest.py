"""Set the threads as in a run: TVM reads their number once, at the start, and would take half."""

import os

from osscompile.runtime.machine import physical_cores

os.environ.setdefault("TVM_NUM_THREADS", str(physical_cores()))
