"""A catalogue of plugins that need nothing installed, and short ways to load a spec with it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peftx_spec import PeftxError, Pipeline, Problem, SpecError, load_pipeline


def _targets(value: object) -> object:
    """Like the core's own selectors: raises an error that is no ValueError."""
    if isinstance(value, str) and "?" in value:
        raise PeftxError(f"'{value}' selects nothing", hint="did you mean 'attention.q'?")
    return value


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Init(Enum):
    ZERO = "zero"
    KAIMING = "kaiming"


class Schedule(_Config):
    start: float = Field(0.0, description="fraction of the steps at which it starts")
    shape: Literal["line", "cosine"] = Field("line", description="how it goes on")


class LoraConfig(_Config):
    rank: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16.0, gt=0, description="scale times rank")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout")
    targets: Annotated[str, BeforeValidator(_targets)] = Field(
        "attention.q", description="what it attaches to"
    )
    use_bias: bool = Field(False, description="train the bias as well")
    layers: tuple[int, ...] = Field((), description="layers; all if empty")
    ranks: dict[str, int] = Field(default_factory=dict, description="rank of a role")
    start: Init = Field(Init.ZERO, description="first values")
    window: int | Literal["auto"] = Field("auto", description="a number or auto")
    schedule: Schedule | None = Field(None, description="when it grows")


class QuantConfig(_Config):
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")


class FilterConfig(_Config):
    keep: float = Field(gt=0, le=1, description="fraction of the examples that stay")


class JudgeConfig(_Config):
    pass


class FakeCatalogue:
    """Five plugins that work, and one that does not load."""

    plugins: ClassVar[dict[str, tuple[frozenset[str], type[BaseModel] | None]]] = {
        "lora": (frozenset({"inject", "train_step"}), LoraConfig),
        "prefixquant": (frozenset({"compress"}), QuantConfig),
        "qlora": (frozenset({"compress", "inject"}), QuantConfig),
        "mosaic-it": (frozenset({"prepare_data"}), FilterConfig),
        "language-ranker": (frozenset({"evaluate", "decode"}), JudgeConfig),
        "broken": (frozenset({"inject"}), None),
    }

    def __init__(self, *, without: Sequence[str] = ()) -> None:
        self.shown = [name for name in self.plugins if name not in without]

    def names(self) -> list[str]:
        return list(self.shown)

    def hooks(self, name: str) -> frozenset[str]:
        return self.plugins[name][0]

    def compresses_own(self, name: str) -> bool:
        return False

    def config(self, name: str) -> type[BaseModel]:
        config = self.plugins[name][1]
        if config is None:
            raise PeftxError(
                f"the plugin '{name}' does not import: no module named 'gone'", hint="reinstall it"
            )
        return config

    def adapter(self, folder: str) -> list[dict[str, Any]]:
        if not folder.endswith("adapter"):
            raise PeftxError(f"'{folder}' is no adapter of PEFT", hint="another folder")
        return [{"use": "lora", "with": {"rank": 4}}, {"use": "prefixquant", "with": {}}]

    def install_hint(self, name: str) -> str:
        return f"install '{name}' from where its author publishes it"


@pytest.fixture(scope="session")
def catalogue() -> FakeCatalogue:
    return FakeCatalogue()


@pytest.fixture(scope="session")
def working() -> FakeCatalogue:
    """The catalogue without the plugin that does not load."""
    return FakeCatalogue(without=["broken"])


@pytest.fixture
def load(catalogue: FakeCatalogue) -> Callable[..., Pipeline]:
    """`load(text, *overrides)`: the pipeline of an indented text."""

    def run(text: str, *overrides: str) -> Pipeline:
        return load_pipeline(
            textwrap.dedent(text).lstrip("\n"), catalogue=catalogue, overrides=list(overrides)
        )

    return run


@pytest.fixture
def problems(load: Callable[..., Pipeline]) -> Callable[..., list[Problem]]:
    """`problems(text, *overrides)`: all that is wrong with an indented text; fails where nothing is."""

    def run(text: str, *overrides: str) -> list[Problem]:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return run


@pytest.fixture
def problem(problems: Callable[..., list[Problem]]) -> Callable[..., Problem]:
    """`problem(text, *overrides)`: the only thing that is wrong with an indented text."""

    def run(text: str, *overrides: str) -> Problem:
        found = problems(text, *overrides)
        assert len(found) == 1, "\n\n".join(map(str, found))
        return found[0]

    return run


@pytest.fixture
def spec_file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Write bytes to a spec file."""

    def write(raw: bytes) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_bytes(raw)
        return path

    return write
