"""`serve`: answer requests in the shapes of OpenAI's API."""

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import whole_number
from ..engine import SEQUENCES, Engine
from ..errors import OsscompileError
from .main import CommandParser, Commands
from .options import add_kv_memory, read_number

if TYPE_CHECKING:
    from ..serve.replicas import Replicas

HOST, PORT = "127.0.0.1", 8000
WAITING = 128
ENDING_SECONDS = 30.0
KEY_VARIABLE = "OSSCOMPILE_API_KEY"
SENDABLE = re.compile(r"[!-~]+")


def add_serve(commands: Commands) -> CommandParser:
    command = commands.add_parser("serve", help="serve a compiled model, with OpenAI's API")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument(
        "--host",
        default=HOST,
        help=f"default: {HOST}, which this machine alone reaches; 0.0.0.0: every machine does",
    )
    command.add_argument("--port", type=_port, default=PORT, help=f"default: {PORT}; 0: a free one")
    command.add_argument("--name", help="of the model, for clients (default: that of OUT)")
    command.add_argument(
        "--sequences",
        type=int,
        default=SEQUENCES,
        metavar="N",
        help=f"answers computed at once (default: {SEQUENCES})",
    )
    command.add_argument(
        "--queue",
        type=int,
        default=WAITING,
        metavar="N",
        help=f"answers that may wait; more are refused with 429 (default: {WAITING})",
    )
    command.add_argument("--context", type=int, metavar="N", help="most positions of an answer")
    add_kv_memory(command)
    command.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="of a page whose scripts may ask from a browser (repeat for several; *: any)",
    )
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="by which clients may ask, beside localhost and addresses (repeat for several; "
        "default: none, and with a --host that others reach any)",
    )
    command.add_argument(
        "--max-body", type=_bytes_of_megabytes, metavar="MB", help="of a request (default: 4)"
    )
    command.add_argument(
        "--end-within",
        type=_seconds,
        default=ENDING_SECONDS,
        metavar="SECONDS",
        help=f"finish answers after SIGTERM for so long (default: {ENDING_SECONDS:g})",
    )
    command.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="engines in a Ray cluster ($RAY_ADDRESS, or this machine), which Ray keeps alive",
    )
    command.epilog = f"${KEY_VARIABLE}: the key that clients must show."
    command.set_defaults(command=serve_artifact)
    return command


def serve_artifact(arguments: argparse.Namespace) -> None:
    try:
        from ..serve.app import MAX_BODY_BYTES
        from ..serve.server import listen, serve
    except ModuleNotFoundError as error:
        raise OsscompileError(
            f"serve: expected fastapi, uvicorn and prometheus_client, found no {error.name}; "
            "install the extra: pip install 'osscompile[serve]'"
        ) from error
    if arguments.queue < 0:
        raise OsscompileError(f"--queue: expected 0 or more, found {arguments.queue}")
    key = _key()
    address = listen(arguments.host, arguments.port)
    name = arguments.name or name_of(arguments.artifact)
    with _open(arguments) as engine:
        print(f"serving {name} on {address.url} (OpenAI's API: {address.url}/v1)", flush=True)
        if address.is_public:
            who = "who has the key" if key else f"anybody, since there is no ${KEY_VARIABLE}"
            print(f"other machines reach it, and {who} may use it", file=sys.stderr, flush=True)
        serve(
            engine,
            address,
            name=name,
            waiting=arguments.queue,
            ending_seconds=arguments.end_within,
            api_key=key,
            allowed_origins=arguments.allow_origin,
            allowed_hosts=arguments.allow_host,
            max_body_bytes=arguments.max_body or MAX_BODY_BYTES,
        )


def _open(arguments: argparse.Namespace) -> "Engine | Replicas":
    names = ("sequences", "context", "kv_memory", "threads")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.replicas is None:
        return Engine(arguments.artifact, **options)
    count = whole_number("--replicas", arguments.replicas)
    try:
        from ..serve.replicas import CLUSTER, Replicas
    except ModuleNotFoundError as error:
        raise OsscompileError(
            f"--replicas: expected ray[serve], found no {error.name}; install the extra: "
            "pip install 'osscompile[ray]'"
        ) from error
    if CLUSTER == "local":
        print(
            "Ray listens on every address of this machine; it obeys who has the token that this "
            "server has made",
            file=sys.stderr,
            flush=True,
        )
    return Replicas(arguments.artifact, count, options)


def name_of(artifact: str) -> str:
    """What clients call a model that was given by path or name, e.g. gpt-oss-20b for
    openai/gpt-oss-20b."""
    return Path(artifact).resolve().name.removesuffix(".osc")


def _key() -> str | None:
    """The key, without the line break of a file that it came from. Raises OsscompileError for one
    that no client can send."""
    given = os.environ.get(KEY_VARIABLE, "")
    key = given.strip()
    if given and not SENDABLE.fullmatch(key):  # which is not shown: others may read what is printed
        raise OsscompileError(
            f"${KEY_VARIABLE}: expected letters, digits and signs of ASCII, found others or none; "
            "choose such a key, or unset it"
        )
    return key or None


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    number = read_number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, found {text!r}")
    return number


def _bytes_of_megabytes(text: str) -> int:
    number = read_number(text) * 1e6
    if not 1 <= number <= 1e12:
        raise argparse.ArgumentTypeError(f"expected megabytes, above 0, found {text!r}")
    return int(number)
