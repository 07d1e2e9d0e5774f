"""Schedules for GPUs; they differ between GPUs by the numbers of the target's capabilities only.

Every stage that a kernel returns is a launch of its own; what lies between is computed where it is
needed, so that no launch leaves anything for the next but in the kernel's arguments.
"""

from .tasks import tasks
from .threads import threads

GPU_RULES = (
    tasks,  # kernels without blocks: no other rule can read them
    threads,  # takes everything that is left
)
