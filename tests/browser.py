"""Headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from serving import PATIENCE, wait_until
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browsing(url: str, folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, whose profile is in `folder`."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [CHROMIUM, *options, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = folder / "DevToolsActivePort"
        wait_until(lambda: told.exists() and "\n" in told.read_text())
        port = told.read_text().split()[0]
        pages = json.load(urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE))
        target = next(page for page in pages if page["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
            page = Page(socket)
            page.go(url)
            yield page
    finally:
        process.kill()
        process.wait()


class Page:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._count = socket, 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def go(self, url: str) -> None:
        self._send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, (condition, self.run("document.body.innerText"))
            time.sleep(0.02)

    def type(self, text: str) -> None:
        self._send("Input.insertText", text=text)

    def press(self, key: str, **more: Any) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], **more}
        self._send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._send("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)

    def dark(self, is_dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))

    def _send(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(PATIENCE))
            if told.get("id") == self._count:
                assert "error" not in told, told
                return told["result"]
            self._keep_error(told)

    def _keep_error(self, told: Any) -> None:
        entry = told.get("params", {}).get("entry", {})
        if told.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            self.errors.append(json.dumps(told["params"]))
