"""`python -m osscompile_runtime.measure DIR`: measure candidates where the runtime alone is."""

from .script import run_script


def main() -> int:
    from .trials.measure import main as measure

    return measure()


if __name__ == "__main__":
    run_script("measure", main)
