"""The process that serves: its port, and how it begins and ends."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OsscompileError
from .answers import Desk
from .app import MAX_BODY_BYTES, make_app
from .connections import Server
from .service import Engines, make_service

BACKLOG = 512  # connections that nobody has accepted yet


@dataclass(frozen=True)
class Address:
    """A socket that listens, so that the port is known to be free before a model is loaded."""

    socket: socket.socket
    url: str
    is_public: bool  # whether other machines reach it


def listen(host: str, port: int) -> Address:
    """Port 0: any that is free. Raises OsscompileError for an address that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise OsscompileError(
            f"{host}:{port}: expected an address to listen on, found that it cannot be had "
            f"({error.strerror or error}); is another server there? choose one with --host and "
            "--port"
        ) from error
    found, port = listening.getsockname()[:2]
    shown = f"[{found}]" if ":" in found else found
    is_public = not ipaddress.ip_address(found).is_loopback
    return Address(listening, f"http://{shown}:{port}", is_public)


def serve(
    engine: Engines,
    address: Address,
    *,
    name: str,
    waiting: int,
    ending_seconds: float,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> None:
    """Serve until a SIGTERM or an interrupt; then finish what was begun, for `ending_seconds` at
    most. An address that this machine alone reaches answers to its own names, and to
    `allowed_hosts`; another to any, unless there are some. Raises InputError for a model without a
    tokenizer."""
    service = make_service(engine, name, waiting)
    app = make_app(
        service,
        api_key=api_key,
        allowed_origins=allowed_origins,
        allowed_hosts=None if address.is_public and not allowed_hosts else allowed_hosts,
        max_body_bytes=max_body_bytes,
    )
    asyncio.run(_serve(Server(app), service.desk, address, ending_seconds))


async def _serve(server: Server, desk: Desk, address: Address, ending_seconds: float) -> None:
    loop, asked_to_end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    serving = asyncio.create_task(server.serve(sockets=[address.socket]))
    asked = asyncio.create_task(asked_to_end.wait())
    await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
    asked_to_end.clear()
    drained = asyncio.create_task(desk.gate.drain(ending_seconds))
    again = asyncio.create_task(asked_to_end.wait())  # a second signal: at once
    await asyncio.wait((drained, again, serving), return_when=asyncio.FIRST_COMPLETED)
    desk.cancel()  # who waits still is told so
    server.should_exit = True
    await serving
