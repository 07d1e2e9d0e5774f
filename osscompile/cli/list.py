"""`list`: what `run` compiled into the cache."""

import argparse
import time

from ..runtime.cli.main import Commands
from ..runtime.cli.terminal import print_table

HEADER = ("name", "target", "profile", "size", "compiled", "used", "checkpoint")


def add_list(commands: Commands) -> None:
    command = commands.add_parser("list", help="list the models that `run` has compiled")
    command.set_defaults(command=_list)


def _list(arguments: argparse.Namespace) -> None:
    from ..cache.entries import Entry, cache_folder, checkpoint_state, list_entries, stale_entries
    from ..cache.facts import compiler_digest

    entries = list_entries()
    stale = stale_entries(entries)

    def row(entry: Entry) -> tuple[str, ...]:
        facts, whole = entry.facts, entry.is_whole()
        state = f"{checkpoint_state(entry)}: {' + '.join((facts.model, *facts.adapters))}"
        if not whole:
            state = "cut off" if entry in stale else "being compiled"
        elif facts.compiler != compiler_digest():
            state += ", by another version"
        return (
            entry.name,
            facts.target,
            facts.profile,
            f"{entry.num_bytes() / 1e9:.2f} GB",
            _day(entry.compiled()) if whole else "-",
            _day(entry.used()),
            state + " (stale)" * (entry in stale),
        )

    print_table([HEADER, *map(row, entries)] if entries else [])
    total = sum(entry.num_bytes() for entry in entries)
    print(f"{total / 1e9:.2f} GB in {cache_folder()}")
    if stale:
        print("stale: another is run instead, or none; `osscompile rm --stale` removes them")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
