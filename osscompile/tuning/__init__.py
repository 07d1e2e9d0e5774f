"""Find better constants for schedules by measuring, and keep them as records.

Three steps, kernel by kernel: `emit` builds candidates into a folder, `runtime/trials/measure.py`
measures them without the compiler, here or on another machine, `records` keeps those that won. The
first two also check every kernel on a device that is new.
"""
