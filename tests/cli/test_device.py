"""A device that does not exist is refused before the work, with the ones that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

NOT_HERE = "cuda:999"
COMMANDS = (
    ["generate", "peftx:tiny", "x"],
    ["evaluate", "peftx:tiny"],
    ["merge", "b", "m"],
    ["serve", "peftx:tiny"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:00000000000000000001"])
def test_no_name_of_a_device(
    installed: Any, refused: Callable[..., str], words: list[str], device: str
) -> None:
    message = refused(*words, "--device", device)
    assert f"--device {device}: there is no such device" in message
    assert "hint: one of auto, cpu, cuda" in message


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_device_that_this_machine_lacks(installed: Any, refused: Callable[..., str], command: str) -> None:
    words = [command, "peftx:tiny", *(["x"] if command == "generate" else [])]
    message = refused(*words, "--device", NOT_HERE)
    assert NOT_HERE in message
    assert "cpu" in message.partition("hint:")[2]


@pytest.mark.parametrize("command", ["apply", "train", "plan"])
def test_a_device_of_a_spec_that_this_machine_lacks(
    installed: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from transformers import PreTrainedModel

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded first")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    installed.scaffold("fake-gain", "inject")
    text = f"peftx: 1\nmodel: {{id: 'peftx:tiny', device: '{NOT_HERE}'}}\n"
    text += "data: {train: 'peftx:sample/train.jsonl'}\nstack: [fake-gain]\ntrain: {steps: 1}\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    message = refused(command, "spec.yaml")
    assert NOT_HERE in message
    assert "auto" in message.partition("hint:")[2]
