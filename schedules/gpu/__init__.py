"""Schedules for GPUs; they differ between GPUs by the target's capabilities only.

Where no other rule is better, every stage that a kernel returns is a launch of its own, and stages
in between are computed where they are needed.
"""

from .attention import attention
from .attention_f16 import attention_f16
from .attention_one import attention_one
from .attention_tf32 import attention_tf32
from .groups import groups
from .matvec import matvec
from .narrow import narrow
from .norm import norm
from .panels import panels
from .route import route
from .route_one import route_one
from .sort import sort
from .sum_one import sum_one
from .swiglu_one import swiglu_one
from .tasks import tasks
from .threads import threads
from .tiles import tiles
from .tiles_bf16 import tiles_bf16
from .tiles_int8 import tiles_int8

GPU_RULES = (
    attention_one,
    attention_f16,  # takes some of the kernels that the next takes
    attention_tf32,
    attention,
    route_one,
    swiglu_one,
    sum_one,
    matvec,
    tiles_bf16,
    route,  # takes a kernel that `tiles` takes
    tiles_int8,  # takes some of the kernels that `tiles` takes
    tiles,
    norm,  # takes some of the kernels that `groups` takes
    sort,  # takes a kernel that `tasks` takes
    narrow,  # takes one of the kernels that `tasks` takes
    tasks,  # kernels without blocks: no other rule can read them
    panels,  # takes some of the kernels that `groups` takes
    groups,
    threads,  # takes everything that is left
)
