"""The page at `/` in a browser: light and dark, and by keyboard alone."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftx import Stack
from peftx.toolkits.serving import Server
from peftx_lora import Lora

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PATIENCE = 120.0
"""Seconds for a step."""


class Browser:
    """A headless Chromium with one page, over DevTools' pipe: JSON, a zero byte after each message."""

    def __init__(self, profile: Path) -> None:
        its_in, self.out = os.pipe()
        self.into, its_out = os.pipe()
        words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "-", *words, "--remote-debugging-pipe"],
            pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(its_in)
        os.close(its_out)
        self.read, self.count, self.session = b"", 0, {}
        self.complaints: list[Any] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> Any:
        """A command of DevTools, and what it gives; what the page complains of meanwhile is kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (told := self._next()).get("id") != self.count:
            if told["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(told["params"])
        assert "error" not in told, told
        return told["result"]

    def _next(self) -> Any:
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.into], [], [], PATIENCE)
            more = os.read(self.into, 2**16) if ready else b""
            assert more, "Chromium says nothing more"
            self.read += more
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def value(self, script: str) -> Any:
        """What an expression, or the promise that it gives, comes to in the page."""
        found = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.value(script):
            assert time.monotonic() < end, f"never: {script}"
            time.sleep(0.02)

    def press(self, key: str, *, shift: bool = False) -> None:
        text = {"Enter": "\r", " ": " "}.get(key)
        code = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowDown": 40}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.do("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.do("Input.dispatchKeyEvent", type="keyUp", **about)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.until(
            "document.readyState === 'complete' && document.querySelector('#stack')?.textContent !== ''"
        )

    def close(self) -> None:
        os.close(self.out)  # Chromium ends when its pipe does
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack("peftx:tiny", [Lora(rank=2)])


def luminance(color: str) -> float:
    """Of an opaque `rgb(r, g, b)`, as WCAG 2 defines it."""
    shares = [int(part) / 255 for part in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color).groups()]  # type: ignore[union-attr]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


COLORS = """
(() => {
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!color.startsWith("rgba")) return color;
    }
  };
  const written = (node) => node.matches("input, select, textarea") ||
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const shown = [...document.querySelectorAll("*")].filter((node) => node.checkVisibility() && written(node));
  return shown.map((node) => [node.id || node.className || node.tagName, getComputedStyle(node).color, behind(node)]);
})()
"""
OUTLINE = """
(({outlineStyle, outlineWidth}) => `${outlineStyle} ${outlineWidth}`)(getComputedStyle(document.activeElement))
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_schemes(
    browser: Browser, stack: Stack, listening: Any, scheme: str
) -> None:
    """4.5 to 1 is what WCAG 2 asks for (level AA)."""
    browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    with listening(Server(stack, name="one"), Server(stack, name="two")) as url:
        browser.open(url)
        browser.value("chosen('one', 'two')")
        browser.do("Input.insertText", text="Once")
        browser.press("Enter")
        browser.until("document.querySelectorAll('#log .figures').length === 2")
        browser.value("put($('log'), 'p', 'error', 'It failed'); 0")
        told = browser.value(COLORS)
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) is (scheme == "light")
    assert {"name", "stack", "user", "figures", "error", "send", "clear", "ask", "model", "key"} <= {
        name for name, *_ in told
    }
    assert {name: round(contrast(*pair), 2) for name, *pair in told if contrast(*pair) < 4.5} == {}
    assert browser.complaints == []


def test_all_can_be_done_by_keyboard(browser: Browser, stack: Stack, listening: Any) -> None:
    focused = "document.activeElement.id"
    with listening(Server(stack, name="one"), Server(stack, name="two")) as url:
        browser.open(url)
        assert browser.value(focused) == "ask"
        browser.do("Input.insertText", text="Once")
        browser.press("Enter", shift=True)
        assert browser.value("$('ask').value") == "Once\n", "Shift and Enter begin a line"
        browser.press("Enter")
        browser.until("document.querySelector('#log .figures') && $('send').textContent === 'Send'")
        assert browser.value("document.querySelector('#log .user').textContent") == "Once"
        assert browser.value("document.querySelector('#log .assistant').textContent") != ""
        assert browser.value(focused) == "ask", "where the next one is typed"
        order = []
        for _ in range(7):
            browser.press("Tab")
            order.append(browser.value(focused))
            assert browser.value(OUTLINE) == "solid 2px", "what has the focus is seen"
            if order[-1] == "beside":
                browser.press("ArrowDown")
                browser.until("$('name').textContent === 'one beside two'")
        assert order == ["model", "beside", "temperature", "tokens", "key", "send", "clear"]
        assert browser.value("$('log').childElementCount") == 0, "another choice begins afresh"
        browser.press("Enter")
        assert browser.value(focused) == "ask"
        browser.value("$('tokens').value = 900; 0")
        browser.do("Input.insertText", text="Once")
        browser.press("Enter")
        browser.until("document.querySelectorAll('#log .assistant').length === 2")
        browser.press("Escape")
        browser.until("$('send').textContent === 'Send'")
        assert browser.value("document.querySelectorAll('#log .error').length") == 0
        for _ in range(7):
            browser.press("Tab")
        browser.press(" ")
        assert browser.value("$('log').childElementCount") == 0
        assert browser.value(focused) == "ask"
    assert browser.complaints == []


def test_what_went_wrong_is_said_and_named(browser: Browser, stack: Stack, listening: Any) -> None:
    """Every control has a name for who does not see it, and what comes is read out; a wrong key is told."""
    with listening(Server(stack, name="one", api_key="secret")) as url:
        browser.do("Page.navigate", url=url)
        browser.until("document.querySelector('#stack')?.textContent.includes('wants its key')")
        nodes = browser.do("Accessibility.getFullAXTree")["nodes"]
        named = {
            node["role"]["value"]: node["name"]["value"]
            for node in nodes
            if not node["ignored"] and "name" in node
        }
        assert named["log"] == "Conversation"
        controls = [
            node for node in nodes if node["role"]["value"] in ("textbox", "spinbutton", "button", "combobox")
        ]
        assert sorted(node["name"]["value"] for node in controls) == [
            "Key", "Message", "New", "Send", "Temperature", "Tokens"
        ], "and none to choose a model, where there is one"  # fmt: skip
        browser.value("$('key').focus()")
        browser.do("Input.insertText", text="secret")
        browser.press("Tab")
        browser.until("$('name').textContent === 'one'")
        assert browser.value("document.querySelector('#log').getAttribute('aria-live')") == "polite"
