"""Find better constants for schedules by measuring, and keep them as records.

There are three steps for each kernel: `emit` builds candidates into a folder,
`runtime/trials/measure.py` measures them without the compiler, here or on another machine, and
`records` keeps those that won. The first two steps also check every kernel on a new device.
"""
