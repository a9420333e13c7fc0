"""What a run would do, as data: the core fills it on the meta device, the CLI shows it."""

from __future__ import annotations

from pydantic import Field

from peftx_spec.base import NonNegative, SpecModel, Text


class PlannedStage(SpecModel):
    """One stage of the run."""

    name: Text = Field(description="kind of the stage: prepare, inject, train, ...")
    plugins: tuple[str, ...] = Field((), description="ids of the plugins that take part, in order")
    reads: tuple[str, ...] = Field((), description="files that the stage reads")
    writes: tuple[str, ...] = Field((), description="files and folders that the stage writes")
    detail: str = Field("", description="what else there is to say, in one line")


class PlannedPlugin(SpecModel):
    """One plugin of the stack, whatever it does."""

    id: Text = Field(description="in the stack")
    modules: NonNegative = Field(0, description="how many modules it changes")
    params: NonNegative = Field(0, description="parameters that it adds")
    bytes: NonNegative = Field(0, description="bytes of these modules and of what it adds, afterwards")
    detail: str = Field("", description="why there is none, or that it is refused")


class TouchedModule(SpecModel):
    """One module that one plugin changes."""

    path: Text = Field(description="name of the module in the model")
    role: str = Field("", description="its role: attention.q, mlp.up, ...; empty where it has none")
    shape: tuple[NonNegative, ...] = Field((), description="shape of its weight")
    plugin: Text = Field(description="id of the plugin")
    params: NonNegative = Field(0, description="parameters that the plugin adds")
    bytes: NonNegative = Field(0, description="bytes of the module and of what the plugin adds, afterwards")


class PlannedConflict(SpecModel):
    """Plugins that cannot stand together, or not in this order."""

    plugins: tuple[str, ...] = Field(description="ids of the plugins that collide")
    reason: Text = Field(description="why they do")
    remedy: str = Field("", description="what would work; empty where nothing does")
    code: str = Field("conflict", description="of the error that a run would end with: peftx explain CODE")


class Totals(SpecModel):
    """Sums over the model."""

    base_params: NonNegative = Field(0, description="parameters of the base model")
    base_bytes: NonNegative = Field(0, description="bytes of the base model")
    added_params: NonNegative = Field(0, description="parameters that the plugins add")
    trainable_params: NonNegative = Field(0, description="parameters that train")
    final_bytes: NonNegative = Field(0, description="bytes of the model in memory at the end of the run")
    bundle_bytes: NonNegative = Field(
        0,
        description="bytes of the tensors in the bundle, about: how many of the base's weights change, or how much is "
        "pruned, only the training tells; tokenizer, history and card are beside them",
    )


class Plan(SpecModel):
    """Everything that a run would do."""

    model: Text = Field(description="id of the base model")
    stages: tuple[PlannedStage, ...] = Field((), description="the stages in order")
    plugins: tuple[PlannedPlugin, ...] = Field((), description="every plugin, in the stack's order")
    modules: tuple[TouchedModule, ...] = Field(
        (), description="every module that changes, in the model's order"
    )
    conflicts: tuple[PlannedConflict, ...] = Field((), description="what stands in the way of the run")
    totals: Totals = Field(default_factory=Totals, description="sums over the model")

    @property
    def runnable(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.conflicts

    def to_json(self) -> str:
        """The plan as JSON, indented; `Plan.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2) + "\n"
