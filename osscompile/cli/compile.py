"""`compile`: a model into an artifact."""

import argparse

from ..runtime.cli.main import Commands
from ..runtime.manifest import TOKENIZER
from .ended import ended_like_interrupted


def add_compile(commands: Commands) -> None:
    command = commands.add_parser("compile", help="compile a model into an artifact")
    add_model(command)
    add_options_of_compile(command)
    command.add_argument(
        "--variants", metavar="A,B", help="of the target's CPUs, to compile for (default: all)"
    )
    command.add_argument("-o", "--output", metavar="OUT", help="default: MODEL-TARGET.osc")
    command.add_argument("--context", type=int, metavar="N", help="most positions")
    command.add_argument(
        "--records",
        metavar="FILE",
        help="of `osscompile tune`, for one variant (default: yours)",
    )
    command.add_argument("--dump", metavar="DIR", help="write the IR after each phase there")
    command.set_defaults(command=_compile)


def add_model(command: argparse.ArgumentParser) -> None:
    """What to compile."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a directory with a checkpoint (Hugging Face, OpenAI), a GGUF file, a model that "
        "Ollama has (gpt-oss:20b), a Hugging Face id, nano, or synthetic:gpt-oss-20b, "
        "synthetic:gpt-oss-120b, synthetic:tiny",
    )
    add_adapter(command)


def add_adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="a LoRA adapter of PEFT to merge; several are merged in order",
    )


def add_options_of_compile(command: argparse.ArgumentParser) -> None:
    """Those that `run` has too, for a model that it compiles."""
    command.add_argument("--target", help="see `osscompile targets` (default: this machine's)")
    command.add_argument(
        "--profile",
        help="fast: int8 dense weights and activations (default); exact: as in the checkpoint",
    )


def _compile(arguments: argparse.Namespace) -> None:
    from ..compiler import compile  # TVM takes seconds to import: only where it is needed

    with ended_like_interrupted():
        output = compile(
            arguments.model,
            arguments.target,
            arguments.output,
            variants=arguments.variants.split(",") if arguments.variants is not None else None,
            profile="fast" if arguments.profile is None else arguments.profile,
            context=arguments.context,
            adapters=arguments.adapter,
            dump=arguments.dump,
            records=arguments.records,
            progress=True,
        )
    asked = f"; ask it something: osscompile run {output} 'What is 17 + 25?'"
    print(f"wrote {output}{asked if (output / TOKENIZER).exists() else ''}")
