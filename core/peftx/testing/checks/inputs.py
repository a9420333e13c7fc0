"""Padding and neighbours in a batch do not show in a row's output, and layers run by themselves."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
from torch import Tensor, nn

from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.parts import AttentionPart
from peftx.kernel.plugin import Claim, Plugin
from peftx.stack import Stack
from peftx.testing.case import Case, assert_close, error_of, inputs_for, output
from peftx.testing.checks.check import changes_model, check, injects
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import COMPANION, QUANTIZER, ReferenceLowRank, ReferenceQuantizer
from peftx.testing.subject import TEXT, TEXTS
from peftx.toolkits.compression.calibration import BlockInputs, walk_blocks


def tolerance(case: Case) -> float:
    """Relative to the largest logit. Rounding of activations turns the last bit of a sum into a whole step."""
    return 5e-2 if case.subject.claims(Claim.QUANTIZES) else 1e-4


@check(on="text", when=changes_model)
def check_padding_is_invisible(case: Case) -> None:
    """A padded row computes what it computes alone and without pads."""
    model = case.finished().model
    inputs = inputs_for(model, padding=case.padding)
    together = output(model, inputs)
    row = len(together) - 1  # the last one is padded most
    real = inputs["attention_mask"][row].bool()
    alone: dict[str, Tensor] = {"input_ids": inputs["input_ids"][row, real][None]}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    if "decoder_input_ids" in inputs:
        alone["decoder_input_ids"] = inputs["decoder_input_ids"][row][None]
        expected, found = output(model, alone)[0], together[row]
    else:
        expected, found = output(model, alone)[0], together[row, real]
    assert_close(found, expected, tolerance(case), f"row {row} padded on the {case.padding} and alone")


@check(when=changes_model)
def check_batch_is_invisible(case: Case) -> None:
    """A row computes in a batch what it computes alone."""
    model = case.finished().model
    inputs = inputs_for(model)
    together = output(model, inputs)
    if (
        case.arch not in TEXT and together.shape[0] == together.shape[-1]
    ):  # CLIP scores each text against each image
        together, rows = together.diagonal()[:, None], len(together)
    else:
        rows = len(together)
    for row in range(rows):
        alone = output(model, {name: x[row : row + 1] for name, x in inputs.items()})
        assert_close(together[row], alone[0], tolerance(case), f"row {row} in a batch of {rows} and alone")


@check(on="first-text", when=changes_model)
def check_embeddings_do_for_tokens(case: Case) -> None:
    """A call on the embeddings of tokens computes what one on their ids does; refused by what claims needs-tokens."""
    model = case.finished().model
    inputs = inputs_for(model)
    by_ids = output(model, inputs)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    error = error_of(
        UnsupportedError, lambda: assert_close(output(model, inputs), by_ids, tolerance(case), WHAT)
    )
    claimed = case.subject.claims(Claim.NEEDS_TOKENS)
    assert claimed or error is None, f"a call on embeddings is refused, so claim needs-tokens: {error}"
    assert not claimed or error is not None, "claims needs-tokens, and a call on embeddings goes through"


WHAT = "logits by embeddings and by ids"


@check(on="first-text", when=injects)
def check_tokens_that_are_told_are_claimed(case: Case) -> None:
    """An attention that asks in a step which key is which token is that of a plugin that claims `tells-tokens`."""
    stack = case.training_stack()
    if not stack.ledger.all(AttentionPart) or case.subject.claims(Claim.TELLS_TOKENS):
        return
    with patch.object(Call, "keys", autospec=True, side_effect=Call.keys) as asked:
        case.train(stack, 1)
    assert not asked.called, f"it asks which key is which token, so claim {Claim.TELLS_TOKENS}"


@check(when=lambda subject: subject.claims(Claim.PASSES_LAYERS))
def check_layers_are_passed_by(case: Case) -> None:
    """Of the linear layers that the base calls, some are not called."""

    def called(stack: Stack) -> set[str]:
        seen: set[str] = set()
        sites = [site for site in stack.anatomy.sites if site.kind == "linear"]
        hooks = [
            site.module.register_forward_hook(lambda *_, path=site.path: seen.add(path)) for site in sites
        ]
        output(stack.model, inputs_for(stack.model))
        for hook in hooks:
            hook.remove()
        return seen

    assert called(Stack(case.model())) - called(case.finished()), (
        f"every layer is called; it claims {Claim.PASSES_LAYERS}"
    )


@check(on="package", when=injects)
def check_layers_run_by_themselves(case: Case) -> None:
    """Llama's layers, run one after the other as a calibration does, are refused if the plugin claims `whole-calls`,
    and go through if it does not."""
    plugin = case.subject.make()
    claimed = Claim.WHOLE_CALLS in plugin.claims
    built: list[Stack] = []
    model = tiny("llama", num_hidden_layers=4)
    refusal = error_of(
        PeftxError, lambda: built.append(Stack(model, [(case.id, plugin)], tokenizer=tiny_tokenizer()))
    )
    if refusal is not None:  # it stands elsewhere
        assert not claimed, f"claims whole-calls, and does not stand on the model that shows it: {refusal}"
        return
    blocks = list(model.model.layers)
    text = {"input_ids": torch.arange(8)[None] + 8}  # of the alphabet, behind the special ones

    def run(number: int, block: nn.Module, inputs: BlockInputs) -> None:
        for _ in inputs.advance(block):
            pass

    def walk() -> None:
        with torch.no_grad():
            walk_blocks(model, blocks, [text], on_block=run)

    error = error_of(PeftxError, walk)
    assert claimed or error is None, f"layers do not run one by one, so claim whole-calls: {error}"
    assert not claimed or error is not None, "claims whole-calls, and its layers run one by one"


@check(on="package", when=lambda subject: subject.claims(Claim.WORKS_ON_PREVIOUS))
def check_works_on_previous(case: Case) -> None:
    """Alone it has nothing to hold; behind a low-rank update of Llama's it has."""
    model = tiny("llama")

    def held(before: list[tuple[str, Plugin]]) -> dict[str, Tensor]:
        members = [*before, (case.id, case.subject.make())]
        stack = Stack(copy.deepcopy(model), members, tokenizer=tiny_tokenizer())
        return stack.ledger.tensors(case.id)

    assert not held([]), f"claims {Claim.WORKS_ON_PREVIOUS}, and holds tensors of its own on a plain model"
    assert held([(COMPANION, ReferenceLowRank())]), (
        f"claims {Claim.WORKS_ON_PREVIOUS}, and holds nothing behind an adapter"
    )


_OF_WEIGHTS = (Claim.TAKES_WEIGHTS, Claim.COMPUTES_LAYERS)
"""Claims of those that cannot stand on integers."""


@check(on="package", when=injects)
def check_stands_on_integers(case: Case) -> None:
    """Behind 8-bit integers in the place of Llama's weights it is built, unless it claims `takes-weights`."""
    claimed = [claim for claim in _OF_WEIGHTS if case.subject.claims(claim)]
    if case.subject.claims(Claim.WORKS_ON_PREVIOUS):
        return  # refused there for another reason

    def built(*before: tuple[str, Plugin]) -> PeftxError | None:
        def build() -> None:
            members = [*before, (case.id, case.subject.make())]
            stack = Stack(tiny("llama"), members, tokenizer=tiny_tokenizer(), inject=False)
            if before:
                stack.compress(list(TEXTS), [QUANTIZER], samples=1, length=8)
            stack.inject()

        return error_of(PeftxError, build)

    refusal = built((QUANTIZER, ReferenceQuantizer()))
    if bool(claimed) == (refusal is not None) or built() is not None:  # as it says, or it stands elsewhere
        return
    assert claimed or refusal is None, f"refused on integers, so claim {Claim.TAKES_WEIGHTS}: {refusal}"
    assert not claimed or refusal is not None, f"claims {claimed[0]}, and stands on integers"


CHECKS = (
    check_layers_run_by_themselves,
    check_stands_on_integers,
    check_works_on_previous,
    check_layers_are_passed_by,
    check_padding_is_invisible,
    check_batch_is_invisible,
    check_embeddings_do_for_tokens,
    check_tokens_that_are_told_are_claimed,
)
