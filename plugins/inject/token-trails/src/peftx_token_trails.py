"""Token Trails: each token is told who speaks it, by a trained vector added to its embedding.

"Token Trails: Navigating Contextual Depths in Conversational AI with ChatLLM" (arXiv:2404.02402). The first
layer's input becomes

    h_t = E[x_t] + R[s_t]          E: [vocabulary, d], frozen; R: [S, d], trained, starts at 0

S speakers; s_t is who speaks token t. Nothing is added to a token that nobody speaks (a document, a system message, a
pad).

Who speaks is read off the tokens: a turn opens with its marker, `User:` or what the tokenizer's chat template writes,

    s_t = the speaker of the last marker that ends at or before t

so training and every later call agree. From one call to the next x goes along with the cache of keys and values
(`model.call.carry`): what reorders, cuts or copies the cache (beams, drafts, shared prefixes) does the same to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftx import CallEdit, Claim, Delta, ModelView, Plugin, PluginConfig, Stack, TrainingData, hookimpl
from peftx.engines.data import Place, text_ids
from peftx.errors import ArchitectureError, BatchError, DataError, OptionError, UnsupportedError
from peftx.kernel.call import Call

if TYPE_CHECKING:
    from datasets import Dataset

NOBODY = 0
"""Id of a token that no speaker says; speaker i of the options is i + 1."""
UNTOLD = -1
"""Of a token of which nobody said who speaks it."""
SYSTEM = "system"
TYPES = "token_type_ids"
"""Column in which a caller may say who speaks."""


class TokenTrailsConfig(PluginConfig):
    """Options of Token Trails; the paper has two speakers, the user and the bot."""

    speakers: tuple[str, ...] = Field(
        ("user", "assistant"), min_length=2, description="roles that get a row of R, in this order"
    )
    markers: dict[str, str] = Field(
        {}, description="role -> text that opens its turns; left out: as the tokenizer renders conversations"
    )

    @model_validator(mode="after")
    def _fit(self) -> TokenTrailsConfig:
        if len(set(self.speakers)) < len(self.speakers):
            raise ValueError("one of `speakers` stands twice")
        if strange := sorted(set(self.markers) - {*self.speakers, SYSTEM}):
            raise ValueError(f"a marker for '{strange[0]}', who is none of `speakers`")
        return self


class Trail(Delta):
    """h = E[x] + R[s], and the reading of s.

    Args:
        speakers: S. width: d. markers: (speaker, token ids of a text that opens its turn). call: what the model is
        called on. owner: the plugin's id.
    """

    full_precision = True  # R is small and starts at 0: bfloat16 would lose its steps

    def __init__(
        self, speakers: int, width: int, *, markers: list[tuple[int, list[int]]], call: Call, owner: str
    ) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(speakers, width))  # [S, d]
        self.markers = sorted(markers, key=lambda marker: len(marker[1]))  # the longer one has the last word
        self.call, self.owner = call, owner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        R = F.pad(self.R, (0, 0, 1, 0)).to(y.dtype)  # [1 + S, d], row 0: nobody
        return y + F.embedding(self.speakers(x), R)  # E[x] + R[s]

    def speakers(self, x: Tensor) -> Tensor:
        """s, [B, T], of the tokens of a call, behind those in its cache; of any others, by themselves."""
        ids, real = self.call.ids, self.call.real
        if ids is None or real is None or not (x is ids or torch.equal(x, ids.to(x.device))):
            return self.read(x)
        said = torch.stack((x, self.given(x)), -1)  # [B, T, 2]
        s = self.read(*self.call.carry(self.owner, said, fill=UNTOLD).unbind(-1))[:, -x.shape[1] :]
        # A pad's embedding is zeros: where a model takes the root of the square (Gemma 3n), R's gradient there would be
        # no number.
        return s.masked_fill(~real.to(s.device), NOBODY)

    def read(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """s, [B, T], of a whole text, by its markers; where somebody said who speaks, as `given`, else `UNTOLD`."""
        turn = torch.full_like(x, UNTOLD)  # who takes the turn with this token
        for speaker, marker in self.markers:
            ends = torch.ones_like(x, dtype=torch.bool)  # does the marker end here
            for back, token in enumerate(reversed(marker)):
                ends &= F.pad(x, (back, 0), value=UNTOLD)[..., : x.shape[-1]] == token
            turn = torch.where(ends, speaker, turn)
        if given is not None:
            turn = torch.where(given == UNTOLD, turn, given)
        place = torch.arange(x.shape[-1], device=x.device)
        taken = torch.where(turn == UNTOLD, 0, place).cummax(-1).values  # where the last turn was taken
        return turn.gather(-1, taken).clamp(min=NOBODY)

    def given(self, x: Tensor) -> Tensor:
        """What the caller says of who speaks, [B, T]."""
        types = self.call.tokens(TYPES, fill=UNTOLD)
        if types is None:
            return torch.full_like(x, UNTOLD)
        low, high = (int(end) for end in self.call.batch[TYPES].aminmax())
        if low < NOBODY or high > len(self.R):
            raise BatchError(
                f"{self.owner}: {TYPES} go from {low} to {high}, and R has {len(self.R)} rows",
                hint="0 for nobody, i for the i-th of `speakers`",
            )
        return types.to(x)


class NoEmbeddings(CallEdit):
    """Refuses inputs that do not say who speaks, where the plugin was told or knows it of the tokens before."""

    def __init__(self, call: Call, owner: str) -> None:
        super().__init__()
        self.call, self.owner = call, owner

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        cache = call.get("past_key_values")
        rows = 0 if cache is None else int(cache.get_seq_length())
        if call.get("input_ids") is None and (rows or TYPES in self.call.batch):
            where = f"go on from a cache of {rows} rows" if rows else f"come with {TYPES}"
            raise UnsupportedError(
                f"{self.owner}: inputs_embeds {where}, and embeddings do not say who speaks",
                hint="give input_ids",
            )
        return call


class TokenTrails(Plugin):
    """See the module."""

    Config = TokenTrailsConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    architectures = ("opt", "gpt_neox", "gemma2", "gemma3n")
    refuses = {"bert": "an encoder", "t5": "an encoder and a decoder"}
    takes = ("messages", "preference")  # or any text with markers; a stack of its own may train on that
    config: TokenTrailsConfig

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        if not data.train:  # the core says so
            return
        if data.format == "messages" or isinstance(data.train[0].get("prompt"), list):
            self._check_roles(data.train)
        elif data.format != "tokenized":
            texts = [marker_text(data.tokenizer, role, self.config.markers) for role in self.config.speakers]
            if not any(text in str(value) for row in data.train for value in row.values() for text in texts):
                raise DataError(
                    f"token-trails: no row of the data holds a turn: none of {', '.join(map(repr, texts))}",
                    hint="train on `messages`, or name the texts that open turns: markers={'user': 'Q:', ...}",
                )

    def _check_roles(self, rows: Dataset) -> None:
        speakers, heard = self.config.speakers, set()
        for index, row in enumerate(rows):
            turns = (
                row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"], *row["rejected"]]
            )
            roles = {turn["role"] for turn in turns}
            if strange := sorted(roles - {*speakers, SYSTEM}):
                raise DataError(
                    f"token-trails: {Place(rows, index)}: '{strange[0]}' is none of the {len(speakers)} "
                    f"speakers {', '.join(speakers)}",
                    hint=f"speakers={[*speakers, strange[0]]}",
                )
            heard |= roles
        if len(heard & set(speakers)) < 2:
            raise DataError(
                f"token-trails: only {', '.join(sorted(heard))} speaks, so there is nobody to tell apart",
                hint="leave the plugin out",
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if [tower.name for tower in model.towers.values()] != ["decoder"] or not model.main.heads:
            raise ArchitectureError(
                f"token-trails: {type(model.module).__name__} is no plain decoder with attention",
                hint="conversations are for causal language models that keep keys and values",
            )
        if not model.restoring:
            self.state["markers"] = marker_ids(stack.tokenizer, self.config)
        site, speakers = model.embedding(), len(self.config.speakers)
        markers, call, owner = self.state["markers"], model.call, model.owner
        site.attach(Trail(speakers, site.out_features, markers=markers, call=call, owner=owner))
        model.column(TYPES)
        model.around(NoEmbeddings(call, owner))


def marker_ids(tokenizer: PreTrainedTokenizerBase, config: TokenTrailsConfig) -> list[tuple[int, list[int]]]:
    """(speaker, token ids) of every marker, as it is tokenized at the start of a text, of a line, or within one."""
    plain = tokenizer.chat_template is None
    others = dict.fromkeys([*([SYSTEM] if plain else []), *config.markers], NOBODY)
    known: dict[tuple[int, ...], int] = {}
    for role, speaker in (others | {role: i for i, role in enumerate(config.speakers, 1)}).items():
        text = marker_text(tokenizer, role, config.markers)
        for context in ("", "a\n") if plain else ("", "a\n", "a "):
            start, ids = text_ids(tokenizer, context.rstrip(" ")), text_ids(tokenizer, context + text)
            if ids[: len(start)] != start:
                continue  # the marker melts into the text before it, which the others cover
            own = tuple(ids[len(start) :])
            if not own or known.setdefault(own, speaker) != speaker:
                raise OptionError(
                    f"token-trails: the marker {text!r} of '{role}' is empty or that of another speaker",
                    hint="name the texts that open turns: markers={'user': 'User:', ...}",
                )
    if tokenizer.bos_token_id is not None:
        known[(int(tokenizer.bos_token_id),)] = NOBODY  # a new text in a packed row
    return [(speaker, list(ids)) for ids, speaker in known.items()]


def marker_text(tokenizer: PreTrainedTokenizerBase, role: str, given: dict[str, str]) -> str:
    """What opens a turn of `role`: what the rendering puts between two turns, less what the first ends with anyway."""
    if role in given:
        return given[role].strip()
    if tokenizer.chat_template is None:
        return f"{role.capitalize()}:"
    roles = ("user", "assistant") if role == "assistant" else ("user", "assistant", role)
    turns = [{"role": name, "content": f"words {i}"} for i, name in enumerate(roles)]
    before, own = (turn["content"] for turn in turns[-2:])
    text, shorter = (str(tokenizer.apply_chat_template(t, tokenize=False)) for t in (turns, turns[:-1]))
    between, found, _ = text.rpartition(before)[2].partition(own)
    rest = between.removeprefix(shorter.rpartition(before)[2]).strip() or between.strip()
    if not (found and rest):
        raise OptionError(
            f"token-trails: the chat template writes nothing before a turn of '{role}'",
            hint=f"markers={{'{role}': ...}}",
        )
    return rest
