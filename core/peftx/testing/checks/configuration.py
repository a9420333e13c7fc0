"""Options, hooks and claims as declared; no model is built."""

from __future__ import annotations

import inspect
import json
from typing import Any

from peftx.errors import PeftxError
from peftx.kernel.names import HOOKS, PROJECT
from peftx.kernel.plugin import Claim, hooks_of
from peftx.stack import Stack
from peftx.testing.case import Case, error_of
from peftx.testing.checks.check import check

_NEEDS = {
    Claim.NEEDS_CALIBRATION: {"compress"},
    Claim.QUANTIZES: {"compress"},
    Claim.FOLDS_PREVIOUS: {"compress"},
    Claim.FINAL: {"compress"},
    Claim.IDENTITY_AT_START: {"inject"},
    Claim.MERGEABLE: {"inject"},
    Claim.BESIDE_WEIGHTS: {"inject"},
    Claim.VIRTUAL_TOKENS: {"inject"},
    Claim.PREFIX_CACHE: {"inject", "decode", "compress"},
    Claim.REPLACES_ATTENTION: {"inject", "compress"},
    Claim.REPLACES_STEP: {"train_step"},
    Claim.REPLACES_LOSS: {"train_step"},
    Claim.PASSES_LAYERS: {"inject"},
    Claim.WHOLE_CALLS: {"inject"},
    Claim.WORKS_ON_PREVIOUS: {"inject"},
    Claim.TAKES_WEIGHTS: {"inject", "compress"},
    Claim.NARROWS: {"compress"},
    Claim.NEEDS_GRADIENTS: {"train_step", "inject"},
    Claim.REPLACES_DECODING: {"decode"},
    Claim.LOSSLESS_DECODING: {"decode"},
    Claim.EXACT_CACHE: {"inject", "decode", "compress", "serve"},
    Claim.EVICTS: {"decode"},
    Claim.KEEPS_PREFIXES: {"serve"},
    Claim.RESTARTS: {"train_step"},
    Claim.TRAINS_BASE: {"inject"},
    Claim.CHANGES_VOCABULARY: {"inject"},
    Claim.DATA_ONLY: {"prepare_data"},
    Claim.NEW_ROWS: {"prepare_data", "train_step"},
    Claim.READS_COLUMNS: {"prepare_data", "train_step"},
}
"""A claim -> the hooks of which one must be there for it to mean anything."""


@check(on="package")
def check_config_round_trip(case: Case) -> None:
    """JSON -> Config -> JSON gives the same text and an equal configuration, and so do keyword options."""
    config = case.subject.make().config
    text = config.model_dump_json()
    again = type(config).model_validate_json(text)
    assert again == config, f"{config!r} came back as {again!r}"
    assert again.model_dump_json() == text, f"{text} came back as {again.model_dump_json()}"
    values = json.loads(text)
    through_python = case.subject.plugin(**values).config
    assert through_python == config, f"as keyword options {config!r} came back as {through_python!r}"


@check(on="package")
def check_config_schema(case: Case) -> None:
    """The JSON Schema is JSON, and every field says what it is for."""
    schema = json.loads(json.dumps(case.subject.plugin.Config.model_json_schema()))
    groups = {case.subject.plugin.Config.__name__: schema, **schema.get("$defs", {})}
    silent = [
        f"{group}.{name}"
        for group, definition in groups.items()
        for name, field in definition.get("properties", {}).items()
        if not str(field.get("description", "")).strip()
    ]
    assert not silent, f"options without a description: {', '.join(silent)}"


@check(on="package")
def check_unknown_option_refused(case: Case) -> None:
    """An option that does not exist is an error that names it."""
    wrong = "no_such_option"
    error = error_of(PeftxError, lambda: case.subject.plugin(**case.subject.options, **{wrong: 1}))
    assert error is not None, f"the option '{wrong}' was accepted"
    assert wrong in str(error), f"the message does not name '{wrong}': {error}"


@check(on="package")
def check_config_is_frozen(case: Case) -> None:
    """A configuration cannot change after the plugin was made."""
    assert case.subject.plugin.Config.model_config.get("frozen") is True, "Config is not frozen"


@check(on="package")
def check_hook_signatures(case: Case) -> None:
    """Hooks are marked, known, ordered by the stack alone, and take arguments that exist."""
    from peftx.composition.members import members_of
    from peftx.kernel.calling import register

    subject = case.subject
    for name in HOOKS:
        function = inspect.getattr_static(subject.plugin, name, None)
        marked = function is None or name in hooks_of(subject.plugin)
        assert marked, f"{name} is defined without @hookimpl, so it would never run"
    assert subject.hooks, f"no hook is implemented; there are: {', '.join(HOOKS)}"
    try:
        register(members_of([(subject.id, subject.make())]), Stack.specs, Stack.defaults())
    except PeftxError as error:
        raise AssertionError(str(error)) from error


@check(on="package")
def check_claims_fit_hooks(case: Case) -> None:
    """Claims are `Claim`s, rest on hooks that are there, and say which loops are replaced."""
    subject = case.subject
    unknown = [claim for claim in subject.plugin.claims if not isinstance(claim, Claim)]
    assert not unknown, f"no claims: {unknown}"
    for claim, hooks in _NEEDS.items():
        idle = subject.claims(claim) and not subject.implements(*hooks)
        assert not idle, f"claims {claim}, but implements no {' or '.join(sorted(hooks))}"
    if subject.claims(Claim.DATA_ONLY):
        others = subject.hooks - {"prepare_data"}
        assert not others, f"claims {Claim.DATA_ONLY}, but implements {', '.join(sorted(others))}"
    for hook, claim in (("train_step", Claim.REPLACES_STEP), ("decode", Claim.REPLACES_DECODING)):
        if hook in subject.hooks:
            replaces = not _options(subject.plugin, hook).get("wrapper")
            assert replaces == subject.claims(claim), (
                f"{hook} is {'a plain implementation' if replaces else 'a wrapper'}, "
                f"and {claim} is {'' if subject.claims(claim) else 'not '}claimed"
            )


def _options(plugin: type, hook: str) -> dict[str, Any]:
    return dict(getattr(getattr(plugin, hook), f"{PROJECT}_impl"))


CHECKS = (
    check_config_round_trip,
    check_config_schema,
    check_unknown_option_refused,
    check_config_is_frozen,
    check_hook_signatures,
    check_claims_fit_hooks,
)
