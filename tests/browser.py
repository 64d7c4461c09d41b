"""A headless Chromium, spoken to by its DevTools protocol over two pipes: JSON messages that end with a zero byte.

https://chromedevtools.github.io/devtools-protocol. `make browser` installs one.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.waiting import SECONDS

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Nothing is asked of any host, and nothing is kept. A sandbox needs a user other than root.
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
OPTIONS += ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
OPTIONS += ["--no-first-run", "--remote-debugging-pipe"]
PATIENCE_SECONDS = 60.0


def find() -> str | None:
    """The path of a Chromium."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a new browser, which ends with `close`. `problems` are what its console said of errors: uncaught
    ones, and what the page's policy kept out."""

    def __init__(self, path: str, profile: Path, *, width: int = 1240, height: int = 900) -> None:
        told, self._answers = os.pipe()[::-1], os.pipe()
        self._write = told[0]
        # The browser reads from its file 3 and writes to its file 4.
        shell = f'exec "$0" "$@" 3<&{told[1]} 4>&{self._answers[1]}'
        command = ["bash", "-c", shell, path, *OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(told[1], self._answers[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(told[1])
        os.close(self._answers[1])
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers[0]], [], [], PATIENCE_SECONDS)
            more = os.read(self._answers[0], 1 << 20) if ready else b""
            assert more, f"the browser does not answer (exit code {self._process.poll()})"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, condition: str | Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Until the expression, or what the function returns, is true. Returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition) if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, condition
            time.sleep(0.1)
        return value

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def point(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """The window as a PNG; `height` makes it so high first."""
        if height is not None:
            self.call(
                "Emulation.setDeviceMetricsOverride", width=1240, height=height, deviceScaleFactor=1, mobile=False
            )
            time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            self._process.kill()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._answers[0])
