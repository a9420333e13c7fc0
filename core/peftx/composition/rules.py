"""Who does not stand beside whom, or not behind whom: stated by claim, never by a plugin's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftx.kernel.plugin import Claim, Plugin, compresses_own, hooks_of

EXCLUSIVE = {
    Claim.REPLACES_STEP: "both replace the training step, and a step has one loss and one update",
    Claim.REPLACES_ATTENTION: "both compute the attention themselves",
    Claim.REPLACES_DECODING: "both replace the decoding loop",
    Claim.REPLACES_LOSS: "both put a loss of their own in the task's place, and a step has one",
    Claim.CLASSIFIES: "both bring the head that names a text's class",
    Claim.QUANTIZES: "both replace the weights by integers",
    Claim.EVICTS: "both leave tokens out of the cache, and a cache has one rule of which stay",
    Claim.KEEPS_PREFIXES: "both keep what prompts begin with, and a server has one store",
}
"""One in a stack."""

FIRST = ", unless that one compresses first (phase: before-training)"
"""When a rule of what compresses a trained model does not hold."""

AnyPlugin = Plugin | type[Plugin]


@dataclass(frozen=True)
class Side:
    """One side of a rule: which plugins it is about, and how its rule is told to one of the other side."""

    is_it: Callable[[AnyPlugin], bool]
    claims: tuple[Claim, ...]
    told: str
    """After "not beside", "not before" or "not after"."""


@dataclass(frozen=True)
class Rule:
    """Two kinds of plugins that do not go together: in no order, or not with `one` before `two`."""

    one: Side
    two: Side
    reason: str
    """With {one} and {two}."""
    ordered: bool = False
    late: bool = False
    """Only where `one` compresses behind the training."""

    @property
    def claims(self) -> tuple[str, ...]:
        return (*self.one.claims, *self.two.claims)


def _claiming(claim: Claim) -> Side:
    return Side(lambda plugin: claim in plugin.claims, (claim,), f"a plugin that claims {claim}")


def changes_model(plugin: AnyPlugin) -> bool:
    """Does it attach something that what is computed depends on; decoding that is exact does not."""
    exact = {Claim.DATA_ONLY, Claim.EXACT_CACHE, Claim.LOSSLESS_DECODING}
    return "inject" in hooks_of(plugin) and not exact & plugin.claims


def _has_phases(plugin: AnyPlugin) -> bool:
    own = plugin if isinstance(plugin, type) else type(plugin)
    return own.phases is not Plugin.phases


def _shares_in_batches(plugin: AnyPlugin) -> bool:
    return {Claim.REPLACES_DECODING, Claim.EXACT_CACHE} <= plugin.claims


def _drafts(plugin: AnyPlugin) -> bool:
    """Does its loop check drafts, one text at a time (`speculative_generate`)."""
    lossless = {Claim.REPLACES_DECODING, Claim.LOSSLESS_DECODING} <= plugin.claims
    return lossless and Claim.EXACT_CACHE not in plugin.claims


def _stays_beside(plugin: AnyPlugin) -> bool:
    """Does it leave something on the model that does not go into the weights, and acts on them; what its own `compress`
    turns into smaller layers is in these."""
    folds = {Claim.MERGEABLE, Claim.BESIDE_WEIGHTS, Claim.TRAINS_BASE}
    return changes_model(plugin) and not (folds & plugin.claims or compresses_own(plugin))


RULES = (
    Rule(
        _claiming(Claim.REPLACES_STEP),
        _claiming(Claim.NEEDS_GRADIENTS),
        "{two} needs gradients, and {one} replaces the training step by one that makes none",
    ),
    Rule(
        _claiming(Claim.OWN_LAYOUT),
        _claiming(Claim.VIRTUAL_TOKENS),
        "{one} lays its rows out with positions and a mask of its own, and the soft tokens of {two} would stand in "
        "front of the first text alone",
    ),
    Rule(
        _claiming(Claim.OWN_LAYOUT),
        _claiming(Claim.GIVES_EMBEDDINGS),
        "{one} lays several texts out in one row, and {two} makes embeddings of whole texts",
    ),
    *(
        Rule(
            _claiming(Claim.KEEPS_PREFIXES),
            _claiming(claim),
            "{one} keeps rows of the cache by the tokens of a prompt, and {two} puts rows there that are no tokens",
        )
        for claim in (Claim.VIRTUAL_TOKENS, Claim.PREFIX_CACHE)
    ),
    Rule(
        _claiming(Claim.RESTARTS),
        Side(_has_phases, (), "a plugin whose training has phases of its own"),
        "{one} takes all that trains back to where the run began, in the middle of what the phases of {two} settle",
    ),
    Rule(
        _claiming(Claim.EVICTS),
        _claiming(Claim.REPLACES_DECODING),
        "{one} leaves tokens out of the cache, and the loop of {two} may share or take back rows of it",
    ),
    Rule(
        Side(_shares_in_batches, (Claim.REPLACES_DECODING, Claim.EXACT_CACHE),
             "a loop that shares rows of the cache in a batch"),
        Side(_drafts, (Claim.REPLACES_DECODING, Claim.LOSSLESS_DECODING), "a loop that checks drafts"),
        "{one} shares rows of the cache among the texts of a batch, and {two} checks the drafts of one text at a time, "
        "so beside it nothing would be shared",
    ),
    Rule(
        _claiming(Claim.FINAL),
        _claiming(Claim.PASSES_LAYERS),
        "{one} measures what goes through the layers, and {two} computes some past their modules",
    ),
    Rule(
        _claiming(Claim.REPLACES_LOSS),
        _claiming(Claim.CLASSIFIES),
        "{one} puts a loss of its own in the task's place, and so does the head of {two}",
    ),
    *(
        Rule(
            _claiming(Claim.NEEDS_LABELS),
            _claiming(other),
            "{one} reads labels of tokens in its step, and the rows of {two} have none of the kind",
        )
        for other in (Claim.CLASSIFIES, Claim.OWN_LAYOUT, Claim.NO_LABELS)
    ),
    Rule(
        _claiming(Claim.NEW_ROWS),
        _claiming(Claim.READS_COLUMNS),
        "{one} trains on rows of its own, and the columns that {two} works by are not in them",
    ),
    Rule(
        _claiming(Claim.NEEDS_MASK),
        _claiming(Claim.OWN_LAYOUT),
        "{one} reads a row as one text, by a mask of one number a token, and {two} lays several texts out in one row",
    ),
    Rule(
        _claiming(Claim.NEEDS_TOKENS),
        _claiming(Claim.GIVES_EMBEDDINGS),
        "{one} tells tokens by their ids, and {two} calls the model on embeddings",
    ),
    *(
        Rule(
            _claiming(Claim.READS_LOSS),
            _claiming(other),
            "{one} evaluates the loss before {two}, which comes after it, has put its own in its place",
            ordered=True,
        )
        for other in (Claim.CLASSIFIES, Claim.OWN_LAYOUT)
    ),
    Rule(
        _claiming(Claim.FINAL),
        Side(changes_model, (), "a plugin that changes the model"),
        "{one} measures and compresses the finished model, so {two}, which comes after it and changes the model, would "
        "undo what it measured",
        ordered=True,
    ),
    Rule(
        _claiming(Claim.QUANTIZES),
        _claiming(Claim.COMPUTES_LAYERS),
        "{one} packs the layers that {two}, which comes after it, computes from their weights",
        ordered=True,
    ),
    Rule(
        Side(_stays_beside, (), "a plugin that does not fold into the weights"),
        _claiming(Claim.FOLDS_PREVIOUS),
        "{two} starts from merged weights, and {one} does not fold into the weights",
        ordered=True,
    ),
    Rule(
        _claiming(Claim.QUANTIZES),
        Side(lambda plugin: changes_model(plugin) and Claim.BESIDE_WEIGHTS not in plugin.claims, (),
             "a plugin that stands on linear layers, unless it compresses first (phase: before-training)"),
        "{one} replaces layers behind the training, and {two}, which comes after it, stands on them then",
        ordered=True,
        late=True,
    ),
    Rule(
        Side(lambda plugin: Claim.NEEDS_CALIBRATION in plugin.claims and "compress" in hooks_of(plugin),
             (Claim.NEEDS_CALIBRATION,),
             "a plugin that calibrates layer by layer, unless it compresses first (phase: before-training)"),
        _claiming(Claim.WHOLE_CALLS),
        "{one} runs layers one by one to calibrate, and {two} works in calls of the whole model",
        late=True,
    ),
)  # fmt: skip
"""Who does not go with whom. `conflicts.find_conflicts` and `rules` both read it."""


def rules(plugin: AnyPlugin) -> list[str]:
    """What a plugin does not go with, in sentences; from its claims alone."""
    found = [f"one in a stack: {claim}" for claim in EXCLUSIVE if claim in plugin.claims]
    for rule in RULES:
        if rule.one.is_it(plugin):
            found.append(f"not {'before' if rule.ordered else 'beside'} {rule.two.told}")
        if rule.two.is_it(plugin):
            more = FIRST if rule.late and "unless" not in rule.one.told else ""
            found.append(f"not {'after' if rule.ordered else 'beside'} {rule.one.told}{more}")
    if Claim.NEEDS_ADAPTERS in plugin.claims:
        found.append("with an adapter, whose deltas add to the output of layers")
    if Claim.WORKS_ON_PREVIOUS in plugin.claims:
        found.append("behind a plugin that attaches parameters")
    if plugin.takes:
        made = sorted(set(plugin.gives.values()))
        gives = f", and leaves {' or '.join(made)}" if made else ""
        found.append(f"trains on rows of format {' or '.join(plugin.takes)}{gives}")
    return found
