"""`python -m osscompile_runtime run | serve | inspect | bench OUT`, where the runtime alone is."""

from .script import run_script

PROG = f"python -m {__package__}"


def main() -> int:
    """Run the command that the command line names; its status: see `run_command`."""
    from .cli.bench import add_bench
    from .cli.inspect import add_inspect
    from .cli.main import CommandParser, Parser, run_command
    from .cli.run import add_run
    from .cli.serve import add_serve
    from .version import __version__

    parser = Parser(prog=PROG, description="Run compiled gpt-oss models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in (add_run, add_serve, add_inspect, add_bench):
        add(commands)
    return run_command(parser)


if __name__ == "__main__":
    run_script(PROG, main)
