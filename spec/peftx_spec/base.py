"""What all models of the spec share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class SpecModel(BaseModel):
    """Frozen, and refuses unknown keys; YAML knows a field by its alias only, Python by its name too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    def unsaid(self) -> frozenset[str]:
        """Fields that a dump leaves out, since another one that is given takes their place."""
        return frozenset()


Text = Annotated[str, Field(min_length=1)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Schedule = Literal["linear", "cosine", "inverse_sqrt", "constant"]
BestMetric = Literal["perplexity", "accuracy", "exact-match"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Reporter = Annotated[
    Annotated[Literal["none", Tracker], Tag("one")] | Annotated[tuple[Tracker, ...], Tag("several")],
    Discriminator(_one_or_several),  # what is wrong with an item is said of that alone
]
