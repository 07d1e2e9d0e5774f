"""Connections over HTTP: how many there are, and when one is ended that nothing comes from."""

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Generator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

MOST = 4096  # connections
SPARE = 48  # descriptors that are left to all else
HEAD_SECONDS = 30.0  # from its beginning until a request's headers are here
KEEP_ALIVE = 75  # seconds from an answer to the headers of the next; clients wait about as long
REST_SECONDS = 5.0  # for what comes of a body after its answer
TAKE_SECONDS = 60.0  # a client that takes nothing of an answer for so long has gone away
ACCEPT_SECONDS = 0.5  # until another is accepted where the machine has no room for one


class Server(uvicorn.Server):
    """Serves an application. It accepts no more connections than there are descriptors for: where
    there is no room, the one that has been idle for longest makes it, or else a new one waits."""

    def __init__(self, app: ASGIApp, most: int | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,  # h11 has limits for headers; httptools has none
                ws="none",
                log_level="error",  # what clients send is no reason to warn
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=5,  # for what is left once nobody waits for an answer
                server_header=False,
            )
        )
        self._most = _room() if most is None else most
        self._changed = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them to who serves: uvicorn would close its port before answers have ended."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """asyncio's own way to accept logs each connection that there is no descriptor for."""
        await super().startup([])
        self._accepting = [asyncio.create_task(self._accept(each)) for each in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:  # it went away, or others took all descriptors
                await asyncio.sleep(ACCEPT_SECONDS)
                continue
            await self._make_room()
            with contextlib.suppress(OSError):  # it went away
                await loop.connect_accepted_socket(self._connection, accepted)

    async def _make_room(self) -> None:
        connections: Any = self.server_state.connections
        while len(connections) >= self._most:
            self._changed.clear()
            idle = [connection for connection in connections if connection.is_idle]
            if idle:
                min(idle, key=lambda connection: connection.idle_since).end()
            await self._changed.wait()

    def _connection(self) -> asyncio.Protocol:
        return Connection(self.config, self.server_state, self.lifespan.state, self._changed)


class Connection(H11Protocol):
    """Ends itself if the headers of a request take too long, or the client takes no answer."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: Any,
        app_state: dict[str, Any],
        changed: asyncio.Event,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._changed = changed  # set when it is idle, or has ended
        self._ends: asyncio.TimerHandle | None = None
        self._unsent = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is answered, and no answer still to be taken."""
        return not self._is_asked and not self.transport.get_write_buffer_size()

    @property
    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def end(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end_within(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._go_on()
        self._changed.set()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_asked:
            self._go_on()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_asked:  # the next one had come already
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._end_within(REST_SECONDS)
        else:
            is_taken = not self.transport.get_write_buffer_size()
            self._end_within(KEEP_ALIVE if is_taken else TAKE_SECONDS)
        self._changed.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_within(TAKE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_asked:
            self._go_on()
        else:
            self._end_within(KEEP_ALIVE)
            self._changed.set()

    def send_400_response(self, msg: str) -> None:
        """As all errors are told. There is no application yet that could."""
        text = "request: expected HTTP with headers of at most 16 kB, found other"
        response = ApiError(400, text, headers={"Connection": "close"}).response()
        head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _go_on(self) -> None:
        if self._ends is not None:
            self._ends.cancel()

    def _end_within(self, seconds: float) -> None:
        self._go_on()
        self.idle_since = self.loop.time()
        self._unsent = self.transport.get_write_buffer_size()
        self._ends = self.loop.call_later(seconds, self._end_late)

    def _end_late(self) -> None:
        """Unless the client has taken some of an answer meanwhile."""
        if 0 < self.transport.get_write_buffer_size() < self._unsent:
            self._end_within(TAKE_SECONDS)
        else:
            self.end()


def _room() -> int:
    """Connections that this process has descriptors for."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = most - len(os.listdir("/dev/fd")) - SPARE
    return MOST if most == resource.RLIM_INFINITY else max(1, min(MOST, free))
