"""What is tested: one plugin class with its options, and on which architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftx.errors import PeftxError
from peftx.kernel.phases import spans
from peftx.kernel.plugin import Claim, Plugin, hooks_of
from peftx.testing.models import ARCHITECTURES, CORE_ARCHITECTURES

ENCODER_DECODERS = frozenset({"t5", "bart", "whisper"})
ENCODERS = frozenset({"bert", "roberta", "deberta_v2"})
NOT_TEXT = frozenset({"vit", "clip", "whisper"})
TEXT = frozenset(ARCHITECTURES) - NOT_TEXT
GENERATIVE = TEXT - ENCODERS - {"llava"}
DECODERS = GENERATIVE - ENCODER_DECODERS
ODD = ("mamba", "bloom", "vit")
"""No attention; attention that is not dispatched; no tokens. A plugin carries each or says why not."""

ROWS: tuple[dict[str, str], ...] = tuple(
    {"prompt": f"Review {number}: the film was {word}.\nSentiment:", "completion": mood}
    for number, (word, mood) in enumerate(
        (
            ("bad", "negative"),
            ("good", "positive"),
            ("dull and long", "negative"),
            ("a joy", "positive"),
            ("weak", "negative"),
            ("strong, and well played", "positive"),
            ("lost", "negative"),
            ("bright", "positive"),
        )
    )
)
"""Rows to train and to measure on where the author of a plugin gives none."""

_CLASSES = tuple(
    {"text": row["prompt"].removesuffix("\nSentiment:"), "label": row["completion"]} for row in ROWS
)
ROWS_BY_FORMAT: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt-completion": ROWS,
    "classification": _CLASSES,
    "text": tuple({"text": f"{row['prompt']} {row['completion']}"} for row in ROWS),
    "messages": tuple(
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS
    ),
    "preference": tuple(
        {
            "prompt": f"User: {row['prompt']}\nAssistant:",
            "chosen": row["completion"],
            "rejected": "positive" if row["completion"] == "negative" else "negative",
        }
        for row in ROWS
    ),
}
"""Rows of every format, for plugins that take others than prompts and completions; labels: negative, positive."""

TEXTS = (
    "Once upon a time there was a film that was good, and nobody went to see it.",
    "The second film was bad. It ran for a year, in every town, and then it was forgotten.",
    "A third one was never made, because the river took the bridge, the camera and the car.",
)
"""Calibration text."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A plugin under test.

    Args:
        plugin: its class. id: its name in stacks and bundles. options: of its configuration.
        models: architectures to test on. rows: training and evaluation rows; `ROWS` unless the plugin needs others.
        refused: architecture -> why the plugin does not work there.
    """

    plugin: type[Plugin]
    id: str
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    rows: Sequence[Mapping[str, Any]] = ROWS
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def hooks(self) -> frozenset[str]:
        return hooks_of(self.plugin)

    def implements(self, *hooks: str) -> bool:
        """Does it implement any of these."""
        return bool(self.hooks & set(hooks))

    def claims(self, claim: Claim) -> bool:
        return claim in self.plugin.claims

    def make(self) -> Plugin:
        return self.plugin(**self.options)


def steps_for(*plugins: Plugin) -> int:
    """The fewest steps of a run, two at least, in which every phase of every plugin has one."""
    return next((n for n in range(2, 100) if all(_fits(plugin, n) for plugin in plugins)), 2)


def _fits(plugin: Plugin, steps: int) -> bool:
    try:
        spans(plugin.phases(), steps, owner="")
    except PeftxError:
        return False
    return True


def default_rows(plugin: type[Plugin]) -> Sequence[Mapping[str, Any]]:
    """The plugin's own examples, else rows of the first format that it takes."""
    if plugin.example_rows:
        return plugin.example_rows
    return ROWS_BY_FORMAT[plugin.takes[0]] if plugin.takes else ROWS


def default_models(plugin: type[Plugin]) -> tuple[str, ...]:
    """The architectures to test on: the core's five and the plugin's own, as far as its hooks concern them."""
    hooks = hooks_of(plugin)
    if hooks & {"inject", "train_step", "compress"}:
        chosen = [*CORE_ARCHITECTURES, *plugin.architectures]
        if Claim.NEEDS_CALIBRATION in plugin.claims:  # calibration text feeds an encoder only
            chosen = [arch for arch in chosen if arch not in ENCODER_DECODERS or arch in plugin.architectures]
    elif "decode" in hooks:
        chosen = [arch for arch in (*CORE_ARCHITECTURES, *plugin.architectures) if arch in GENERATIVE]
    else:
        chosen = ["llama", *plugin.architectures]
    return tuple(dict.fromkeys(chosen))
