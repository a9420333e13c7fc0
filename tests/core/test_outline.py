"""What is read of a plugin's file without importing it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from peftx import Claim, Registry
from peftx.composition.outline import PREFIX, outline
from peftx.kernel.plugin import hooks_of

HEAD = """
from __future__ import annotations
import math
from typing import TYPE_CHECKING, Literal
import heavy
from heavy import Tensor, nn
from pydantic import Field, model_validator
from peftx import Claim, Delta, Plugin, PluginConfig, Targets, hookimpl
if TYPE_CHECKING:
    from heavy import Other
"""
HEAVY = "raise RuntimeError('imported')"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The outline of `Method` in a module of this text, beside a package whose import fails."""
    name = "outlined_" + "".join(c for c in request.node.name if c.isalnum())
    (tmp_path / "heavy.py").write_text(HEAVY, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def read(text: str, head: str = HEAD) -> Any:
        (tmp_path / f"{name}.py").write_text(head + text, "utf-8")
        return outline(name, "Method")

    yield read
    assert name not in sys.modules
    sys.modules.pop(PREFIX + name, None)


def test_options_claims_and_hooks_without_an_import(read: Any) -> None:
    cls = read("""
Kind = Literal["a", "b"]
LIMIT = math.floor(7.5)
def small(value):
    return value < LIMIT
class MethodConfig(PluginConfig):
    kind: Kind = Field("a", description="which")
    targets: Targets = Field(Targets("all"), description="where")
    size: int = Field(1, description="how much")
    @model_validator(mode="after")
    def _small(self) -> MethodConfig:
        if not small(self.size):
            raise ValueError("too large")
        return self
class Part(Delta):
    def __init__(self):
        self.x = heavy.zeros(3)
class Method(Plugin):
    Config = MethodConfig
    claims = {Claim.MERGEABLE}
    part = Part()
    def __init__(self, config=None, /, **options):
        super().__init__(config, **options)
        if self.config.kind == "b":
            self.claims = self.claims | {Claim.NEEDS_LABELS}
    def claimed(self):
        return self.claims | {Claim.PREFIX_CACHE} if self.config.size > 2 else self.claims
    @hookimpl
    def inject(self, model):
        heavy.ones(3)
    @heavy.no_grad()
    def helper(self, x: Tensor = None):
        return nn.Linear
""")
    assert hooks_of(cls) == {"inject"}
    assert cls().claims == {Claim.MERGEABLE}
    assert cls(kind="b").claims == {Claim.MERGEABLE, Claim.NEEDS_LABELS}
    assert cls(size=3).claims == {Claim.MERGEABLE, Claim.PREFIX_CACHE}
    assert cls.Config(size=6).size == 6
    with pytest.raises(ValidationError, match="too large"):
        cls.Config(size=7)
    assert not hasattr(cls, "part"), "made of what the import brings, and not for anybody to ask"


@pytest.mark.parametrize(
    "text",
    [
        "class Method(heavy.Base): pass",
        "class Method(Plugin):\n    claims = heavy.claims()",
        "class C(PluginConfig):\n    x: Tensor = Field(description='x')\nclass Method(Plugin):\n    Config = C",
        "class C(PluginConfig):\n    x: int = Field(heavy.pi, description='x')\nclass Method(Plugin):\n    Config = C",
        "class Method(Plugin):\n    def __init__(self, **options):\n        heavy.begin()",
        "Method = heavy.make()",
        "class Other(Plugin): pass",
    ],
)
def test_no_outline_where_the_import_is_needed(read: Any, text: str) -> None:
    assert read(text) is None


def test_no_outline_where_annotations_are_values(read: Any) -> None:
    assert read("class Method(Plugin): pass", HEAD.replace("from __future__ import annotations", "")) is None


def test_every_plugin_here_has_one() -> None:
    """What `validate` and `info` cost does not grow with what a plugin imports."""
    registry = Registry(disabled=())
    points = [registry.point(name) for name in registry.names()]
    assert [p.name for p in points if outline(p.module, p.attr) is None] == []


@pytest.mark.parametrize(
    "text",
    [
        "FOUND = {{}}\nFOUND['a'] = 3\n{config}{plugin}",
        "FOUND = [1]\nFOUND.append(2)\n{config}{plugin}",
        "FOUND = 1\ndef change():\n    global FOUND\n    FOUND = 2\nchange()\n{config}{plugin}",
        "FOUND = [1]\nfor n in (1, 2):\n    FOUND.append(n)\n{config}{plugin}",
        "FOUND = 1\n{config}{plugin}Method.claims = Method.claims | {{Claim.EDITS_INPUTS}}\n",
        "FOUND = 1\n{config}{plugin}setattr(Method, 'example', {{'a': 1}})\n",
        "FOUND = 1\n{config}{plugin}    if True:\n        @hookimpl\n        def inject(self, model): return nn\n",
        "FOUND = 1\n{config}{plugin}    @hookimpl\n    def inject(self, model, kind=nn.Linear):\n        return kind\n",
    ],
)
def test_no_outline_where_something_changes_what_it_stands_on(read: Any, text: str) -> None:
    config = "class MethodConfig(PluginConfig):\n    a: int = Field(len(str(FOUND)), description='x')\n"
    plugin = "class Method(Plugin):\n    Config = MethodConfig\n    claims = {Claim.MERGEABLE}\n"
    assert read(text.format(config=config, plugin=plugin)) is None


def test_a_file_that_changed_is_read_again(read: Any) -> None:
    text = (
        "class MethodConfig(PluginConfig):\n    a: int = Field({}, description='x')\n"
        "class Method(Plugin):\n    Config = MethodConfig\n"
    )
    assert [read(text.format(n)).Config().a for n in (1, 22)] == [1, 22]
