"""Attention steering: marked spans of a prompt get more of the attention of chosen heads.

"Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs" (arXiv:2311.02262), where it is called PASTA.
For the marked tokens G of a prompt, its other tokens G-, and the attention A of a head in H,

    T(A)_ij = alpha A_ij / C_i   j in G-        C_i: so that row i still sums to 1
    T(A)_ij = A_ij / C_i         elsewhere      out = T(A) V

Tokens that the model writes are in neither set, so it attends to them as before. Nothing trains; alpha = 0.01. Which
heads steer well is found out by `profile`: each alone, on a few rows of several tasks; H is those that are among the k
best of every task.

The marks come with the prompt as a column, 1 for tokens of G: `stack.columns(highlight=marks(stack, prompts, spans))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peftx import AttentionEdit, Claim, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ArchitectureError, GenerationError, ModelError, OptionError
from peftx.kernel.call import Call
from peftx.toolkits.decoding.text import ids_for

COLUMN = "highlight"


class AttentionSteeringConfig(PluginConfig):
    """Options of attention steering."""

    alpha: float = Field(
        0.01, gt=0, le=1, description="alpha, what attention to unmarked tokens is scaled by"
    )
    heads: tuple[tuple[int, int], ...] = Field(
        (),
        description="H, heads that steer as [layer, head], as `profile` gives them; all of them if left out",
    )


class Steer(AttentionEdit):
    """T in one layer.

    Args:
        call: what the model is called on. owner: the plugin's id. layer: which. heads: of it, in H. alpha: the scale.
    """

    def __init__(self, call: Call, owner: str, layer: int, heads: Sequence[int], alpha: float) -> None:
        super().__init__()
        self.call, self.owner, self.layer, self.H, self.alpha = call, owner, layer, list(heads), alpha

    def opens(self) -> bool:
        return self.call.tokens(COLUMN) is not None

    def probabilities(self, p: Tensor) -> Tensor:
        marked = self.call.batch[COLUMN].any(1, keepdim=True)  # a row without marks is left alone
        rest = (self.call.tokens(COLUMN, fill=1) == 0) & marked
        rest = self.call.keys(self.call.carry(self.owner, rest.long()), p)  # G-, [B, K]
        T = p[:, self.H].float() * torch.where(rest == 1, self.alpha, 1.0)[:, None, None]
        p = p.clone()
        p[:, self.H] = (T / T.sum(-1, keepdim=True)).to(p.dtype)
        return p


class AttentionSteering(Plugin):
    """See the module."""

    Config = AttentionSteeringConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.TELLS_TOKENS}
    architectures = ("gemma", "mistral", "phi3")
    refuses = {
        "t5": "a decoder reads the marked text by way of an encoder",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "vit": "it reads no tokens",
    }
    config: AttentionSteeringConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if model.anatomy.is_encoder_decoder or model.module.main_input_name != "input_ids":
            raise ArchitectureError(
                f"attention-steering: {model.config.model_type} does not attend to the tokens of a prompt itself",
                hint="a decoder or an encoder of text",
            )
        model.column(COLUMN)
        sites = {site.layer: site for site in model.attention_sites()}
        every = [(layer, head) for layer in sites for head in range(model.main.by_layer[layer].heads)]
        if strange := set(self.config.heads) - set(every):
            raise OptionError(
                f"attention-steering: there is no head {list(min(strange))}",
                hint=f"[layer, head], from {list(every[0])} to {list(every[-1])}",
            )
        for layer, site in sites.items():
            if heads := [head for place, head in self.config.heads or every if place == layer]:
                site.attend(Steer(model.call, model.owner, layer, heads, self.config.alpha))


def marks(stack: Stack, prompts: Sequence[str], spans: Sequence[Sequence[str]]) -> Tensor:
    """The column for prompts that `stack.generate` gets as one list, [N, T]: 1 for tokens of the spans.

    Args:
        spans: of each prompt the texts in it that are to be attended to, each where it stands first.

    Raises:
        PeftxError: a span that its prompt does not hold.
    """
    if not stack.tokenizer.is_fast:
        raise ModelError(
            "attention-steering: a slow tokenizer does not tell where in a text its tokens stand"
        )
    rows = []
    for prompt, texts in zip(prompts, spans, strict=True):
        found = stack.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        begin, end = torch.tensor(found["offset_mapping"]).T
        row = torch.zeros_like(begin)
        for text in texts:
            if (first := prompt.find(text)) < 0:
                raise GenerationError(f"attention-steering: {text!r} is not in the prompt {prompt!r}")
            row |= (begin < first + len(text)) & (end > first)
        rows.append(F.pad(row, (len(ids_for(stack, prompt)) - len(row), 0)))  # BOS
    return pad_sequence(rows, batch_first=True, padding_side="left").to(stack.model.device)


def profile(
    stack: Stack, tasks: Sequence[Callable[[], float]], k: int, *, id: str = "attention-steering"
) -> list[tuple[int, int]]:
    """Heads that are among the k best of every task, for `heads`.

    Args:
        tasks: each runs the stack on a few rows with their marks, and gives a score, of which more is better.

    Raises:
        PeftxError: no head is.
    """
    edits = [part.module for part in stack.ledger.of(id) if isinstance(part.module, Steer)]
    H = [edit.H for edit in edits]
    places = [(edit, head) for edit in edits for head in edit.H]
    scores = []
    try:
        for one, head in places:
            for edit in edits:
                edit.H = [head] if edit is one else []
            scores.append([task() for task in tasks])
    finally:
        for edit, heads in zip(edits, H, strict=True):
            edit.H = heads
    best = torch.tensor(scores).argsort(dim=0, descending=True, stable=True)[:k]  # [k, tasks]
    common = set.intersection(*map(set, best.T.tolist()))
    if not common:
        raise OptionError(f"{id}: no head is among the {k} best of every task", hint="a larger k")
    return [(places[i][0].layer, places[i][1]) for i in sorted(common)]
