"""Far machines, over TVM's RPC: a tracker knows the servers, by key.

On the far machine run `python -m tvm.exec.rpc_tracker` once, and beside it, with all of TVM
installed, `python -m tvm.exec.rpc_server --tracker HOST:PORT --key K`. Whoever reaches a server can
run code there: use a network that you trust.
"""

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import RemoteError

CONNECT_SECONDS = 5
WAIT_SECONDS = 15  # for a server to come back: one whose session crashed tries every 5


@dataclass(frozen=True)
class Remote:
    """A server that a tracker knows by `key`."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"{self.key} at {self.host}:{self.port}"

    def session(self, seconds: float) -> Any:
        """A new session, once the server is free, for so many seconds. What crashes it ends the
        server too (TVM 0.27). Raises RemoteError."""
        rpc = _import_rpc()
        try:
            socket.create_connection((self.host, self.port), CONNECT_SECONDS).close()
            tracker = rpc.connect_tracker(self.host, self.port)  # would try for a minute
            deadline = time.monotonic() + WAIT_SECONDS
            while not self._is_known(tracker):  # a request would wait for ever
                if time.monotonic() > deadline:
                    raise RemoteError(
                        f"{self}: expected a server of that key, the tracker knows none; start it: "
                        f"python -m tvm.exec.rpc_server --tracker {self.host}:{self.port} "
                        f"--key {self.key}"
                    )
                time.sleep(0.2)
            return tracker.request(self.key, session_timeout=seconds)
        except (OSError, RuntimeError) as error:
            raise RemoteError(
                f"{self}: expected a tracker of TVM's RPC, found: {error}; start one there: "
                f"python -m tvm.exec.rpc_tracker --port {self.port}"
            ) from error

    def _is_known(self, tracker: Any) -> bool:
        servers = tracker.summary()["server_info"]
        return any(server["key"] == f"server:{self.key}" for server in servers)


def parse_remote(address: str | None, key: str | None) -> Remote | None:
    """HOST:PORT of the tracker, and the key; None without either. Raises RemoteError."""
    if address is None:
        if key is not None:
            raise RemoteError("--key: expected --rpc HOST:PORT too, found none; it names a server")
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RemoteError(f"--rpc: expected HOST:PORT of a tracker, found {address!r}")
    if not key:
        raise RemoteError("--rpc: expected --key K too, as the far server was started with")
    return Remote(host, int(port), key)


def upload(session: Any, file: Path) -> Any:
    """A compiled library, loaded there."""
    session.upload(str(file), target=file.name)
    return session.load_module(file.name)


def is_alive(session: Any) -> bool:
    try:
        session.get_function("runtime.GetDeviceAttr")
    except Exception:  # whatever a broken connection raises
        return False
    return True


def _import_rpc() -> ModuleType:
    try:
        from tvm import rpc
        from tvm.rpc import tracker  # noqa: F401  (what it needs, `rpc` alone imports lazily)
    except ImportError as error:
        raise RemoteError(
            f"--rpc: expected what TVM's RPC needs to be installed, found: {error}; "
            "pip install 'osscompile[rpc]'"
        ) from error
    return rpc  # type: ignore[no-any-return]
