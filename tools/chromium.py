"""Chromium, driven over its debugging pipe: nothing to install but the browser."""

import json
import os
import subprocess
from typing import Any


class Tab:
    """One tab, which counts its calls and keeps the events that come in between."""

    def __init__(self, profile: str) -> None:
        (asked, asking), (answers, answering) = os.pipe(), os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        line = f"exec chromium {options} 3<&{asked} 4>&{answering}"
        self.chromium = subprocess.Popen(["sh", "-c", line], pass_fds=(asked, answering), stderr=subprocess.DEVNULL)
        os.close(asked)
        os.close(answering)
        self.asking, self.answers, self.rest = asking, answers, b""
        self.count, self.events, self.session = 0, list[dict[str, Any]](), dict[str, str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        os.write(self.asking, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not (part := os.read(self.answers, 1 << 16)):
                raise RuntimeError("Chromium ended. Is it installed as 'chromium'?")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return found["result"]["value"]

    def visit(self, url: str, width: int) -> None:
        """Open a page, and wait until it asks for nothing more."""
        self.resize(width, 844)
        self.events.clear()
        loader = self.call("Page.navigate", url=url)["loaderId"]
        idle = {"name": "networkIdle", "loaderId": loader}
        while not any(idle.items() <= event["params"].items() for event in self.events):
            self.events.append(self.receive())

    def resize(self, width: int, height: int) -> None:
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
