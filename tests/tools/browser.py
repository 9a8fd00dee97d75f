"""A page in headless Chromium, spoken to by its DevTools protocol over two pipes."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
PROGRAM = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
PATIENCE = 120  # seconds for an answer
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-extensions"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


class Browser:
    """One page. `requests` are the addresses it asked for, `errors` what went wrong in it."""

    def __init__(self, folder: Path):
        assert PROGRAM
        its_input, self.to = os.pipe()
        self.back, its_output = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4
        shell = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        command = [PROGRAM, *OPTIONS, f"--user-data-dir={folder / 'chromium'}"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self.unread = b""
        self.sent = 0
        self.session: dict[str, str] = {}
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loaded = False
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def next_message(self) -> dict[str, Any]:
        """An answer, or an event, which is noted."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], max(end - time.monotonic(), 0))
            part = os.read(self.back, 1 << 16) if ready else b""
            assert part, "Chromium does not answer"
            self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))

    def open(self, path: Path, width: int, height: int = 800) -> None:
        """Waits until all of the page is there."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.loaded = False
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.next_message()

    def value_of(self, expression: str) -> Any:
        """Of JavaScript."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, by its name and number."""
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.ask("Input.dispatchKeyEvent", **event)
