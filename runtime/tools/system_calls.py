"""A filter of system calls, as Linux's seccomp takes it: those that give memory which no limit of a
process counts."""

import platform
import struct

# By machine: how its kernel names it, and its numbers of shmget, memfd_create and memfd_secret.
NUMBERS = {
    "x86_64": (0xC000003E, (29, 319, 447)),
    "aarch64": (0xC00000B7, (194, 279, 447)),
}
OTHER_CALLS = 0x40000000  # from here on x86 has a second table
# Instructions of classic BPF: load a word, jump where it is equal or not less, return.
LOAD, IF_EQUAL, IF_NOT_LESS, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, MACHINE = 0, 4  # where a call's stand
ALLOW, NO_SUCH_CALL = 0x7FFF0000, 0x00050000 | 38  # ENOSYS, with which programs can live


def memory_filter() -> bytes | None:
    """None for a machine whose numbers are not known."""
    if platform.machine() not in NUMBERS:
        return None
    machine, numbers = NUMBERS[platform.machine()]
    tests = [(IF_NOT_LESS, OTHER_CALLS), *((IF_EQUAL, number) for number in numbers)]
    program = [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 0, len(tests) + 2, machine),  # another's calls are refused
        (LOAD, 0, 0, NUMBER),
        *((test, len(tests) - i, 0, value) for i, (test, value) in enumerate(tests)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NO_SUCH_CALL),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
