"""Token Trails: each token is told who speaks it, by a trained vector added to its embedding.

"Token Trails: Navigating Contextual Depths in Conversational AI" (arXiv:2404.02402). The first layer's input becomes

    h_t = E[x_t] + R[s_t]          E: [vocabulary, d], frozen; R: [S, d], trained, starts at 0

S speakers; s_t is who speaks token t. Nothing is added to a token that nobody speaks (a document, a system message, a
pad).

Who speaks is read off the tokens: a turn opens with its marker, `User:` or what the tokenizer's chat template writes,

    s_t = the speaker of the last marker that ends at or before t

so training and every later call agree. From one call to the next, x and s lie in the cache of keys and values, as one
more layer: what reorders, cuts or copies the cache (beams, drafts, shared prefixes) does the same to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from peftx import CallEdit, Claim, Delta, ModelView, Plugin, PluginConfig, Stack, TrainingData, hookimpl
from peftx.engines.data import text_ids
from peftx.errors import ArchitectureError, DataError, PeftxError, UnsupportedError

NOBODY = 0
"""Id of a token that no speaker says; speaker i of the options is i + 1."""
SYSTEM = "system"


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
        speakers: S. width: d. markers: (speaker, token ids of a text that opens its turn). owner: the plugin's id.
    """

    full_precision = True  # R is small and starts at 0: bfloat16 would lose its steps

    def __init__(
        self, speakers: int, width: int, *, markers: list[tuple[int, list[int]]], owner: str
    ) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(speakers, width))  # [S, d]
        self.markers = sorted(markers, key=lambda marker: len(marker[1]))  # the longer one has the last word
        self.owner = owner
        # Of the call that runs, [B, T]: x, s, and s as it is added, which is nobody at pads.
        self.now: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        known = self.now is not None and self.now[0].shape == x.shape
        s = self.now[2] if known else self.read(x)
        R = F.pad(self.R, (0, 0, 1, 0)).to(y.dtype)  # [1 + S, d], row 0: nobody
        return y + F.embedding(s, R)  # E[x] + R[s]

    def read(self, x: Tensor, past: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """s, [B, T]. x: [B, T]; past: tokens before x, [B, P]; last: who spoke the last of them, [B, 1]."""
        seen = x if past is None else torch.cat((past, x), -1)  # [B, P + T]
        turn = torch.full_like(x, -1)  # who takes the turn with this token
        for speaker, marker in self.markers:
            ends = torch.ones_like(x, dtype=torch.bool)  # does the marker end here
            for back, token in enumerate(reversed(marker)):
                before = F.pad(seen, (back, 0), value=-1)[..., : seen.shape[-1]]
                ends &= before[..., -x.shape[-1] :] == token
            turn = torch.where(ends, speaker, turn)
        place = torch.arange(1, x.shape[-1] + 1, device=x.device)
        taken = (
            torch.where(turn >= 0, place, 0).cummax(-1).values
        )  # 1 + where the turn was taken; 0: before x
        first = torch.full_like(x[..., :1], NOBODY) if last is None else last
        return torch.cat((first, turn), -1).gather(-1, taken)

    def remembered(self, cache: Cache | None) -> DynamicLayer | None:
        """The layer of the cache that holds x and s of the calls before."""
        layers = [] if cache is None else cache.layers
        return next((layer for layer in layers if vars(layer).get("token_trails") == self.owner), None)

    def remember(self, cache: Cache, x: Tensor, s: Tensor) -> None:
        """Add x and s, [B, T], to the cache, as keys and values are: [B, 1, T, 1]."""
        layer = self.remembered(cache)
        if layer is None:
            layer = DynamicLayer()
            layer.token_trails = self.owner
            layer.is_compileable = True  # as the rest of a static cache: else its empty places were read
            cache.layers.append(layer)
        # Rows that are no tokens: a soft prompt in front.
        others = int(cache.get_seq_length()) - layer.get_seq_length() - x.shape[1]
        x, s = F.pad(x, (others, 0), value=-1), F.pad(s, (others, 0), value=NOBODY)
        layer.update(x[:, None, :, None], s[:, None, :, None])

    def checked(self, types: Tensor, x: Tensor | None) -> Tensor:
        if x is None or types.shape != x.shape:
            shape = None if x is None else tuple(x.shape)
            raise PeftxError(
                f"{self.owner}: token_type_ids {tuple(types.shape)} beside input_ids {shape}",
                hint="one speaker for each token: 0 for nobody, i for the i-th of `speakers`",
            )
        if types.min() < NOBODY or types.max() > len(self.R):
            raise PeftxError(
                f"{self.owner}: token_type_ids go from {int(types.min())} to {int(types.max())}, and R has "
                f"{len(self.R)} rows",
                hint="0 for nobody, i for the i-th of `speakers`",
            )
        return types.long()


class Calls(CallEdit):
    """Ahead of a call, finds s: as `token_type_ids` says, else from the tokens and the cache. Then fills the cache."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        self.trail = (trail,)  # in a tuple: the embedding owns it

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        (trail,) = self.trail
        types, call = call.get("token_type_ids"), {n: v for n, v in call.items() if n != "token_type_ids"}
        x, mask, cache = (call.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        rows = 0 if cache is None else int(cache.get_seq_length())
        if types is not None:
            s = trail.checked(types, x)
            trail.now = x, s, without_pads(s, mask, rows)
            return call
        layer = trail.remembered(cache)
        known = 0 if layer is None else layer.get_seq_length()
        if rows != known:
            raise UnsupportedError(
                f"{trail.owner}: the cache holds {rows} rows, and it is known who spoke {known} of them",
                hint="fill it by calls of the model with the plugin switched on, or give token_type_ids",
            )
        if x is not None:
            past = (layer.keys[:, 0, :, 0], layer.values[:, 0, -1:, 0]) if rows else ()
            s = trail.read(x, *past)
            trail.now = x, s, without_pads(s, mask, rows)
        elif rows:
            raise UnsupportedError(
                f"{trail.owner}: inputs_embeds go on from a cache of {rows} rows, and embeddings do not say who speaks",
                hint="give input_ids",
            )
        return call

    def after(self, output: Any) -> None:
        (trail,) = self.trail
        now, trail.now = trail.now, None
        if output is None or now is None:
            return
        values = output if isinstance(output, tuple) else output.values()
        for cache in (value for value in values if isinstance(value, Cache)):
            trail.remember(cache, *now[:2])


def without_pads(s: Tensor, mask: Any, rows: int) -> Tensor:
    """s with nobody at pads, which a mask of all tokens tells: [B, rows + T]. A pad's embedding is zeros: where a model
    takes the root of the square (Gemma 3n), R's gradient there would be no number."""
    if not isinstance(mask, Tensor) or mask.shape != (len(s), rows + s.shape[1]):
        return s
    return s.masked_fill(mask[:, rows:] == 0, NOBODY)


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
        if data.train is None or len(data.train) == 0:
            raise DataError("token-trails: there are no conversations to train on")
        if data.format == "messages":
            self._check_roles(data)
        elif data.format != "tokenized":
            texts = [marker_text(data.tokenizer, role, self.config.markers) for role in self.config.speakers]
            if not any(text in str(value) for row in data.train for value in row.values() for text in texts):
                raise DataError(
                    f"token-trails: no row of the data holds a turn: none of {', '.join(map(repr, texts))}",
                    hint="train on `messages`, or name the texts that open turns: markers={'user': 'Q:', ...}",
                )

    def _check_roles(self, data: TrainingData) -> None:
        speakers, heard = self.config.speakers, set()
        for index, row in enumerate(data.train):
            roles = [message["role"] for message in row["messages"]]
            if not roles:
                raise DataError(f"token-trails: row {index} (counting from 0) is an empty conversation")
            strange = [role for role in roles if role not in speakers and role != SYSTEM]
            if strange:
                raise DataError(
                    f"token-trails: row {index} (counting from 0): '{strange[0]}' is none of the {len(speakers)} "
                    f"speakers {', '.join(speakers)}",
                    hint=f"speakers={[*speakers, strange[0]]}",
                )
            heard.update(roles)
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
        site = model.embedding()
        trail = site.attach(
            Trail(
                len(self.config.speakers), site.out_features, markers=self.state["markers"], owner=model.owner
            )
        )
        model.around(Calls(trail))


def marker_ids(tokenizer: PreTrainedTokenizerBase, config: TokenTrailsConfig) -> list[tuple[int, list[int]]]:
    """(speaker, token ids) of every marker, as it is tokenized at the start of a text, of a line, or within one."""
    plain = tokenizer.chat_template is None
    roles = dict.fromkeys([*config.speakers, *([SYSTEM] if plain else []), *config.markers])
    known: dict[tuple[int, ...], int] = {}
    for role in roles:
        speaker = config.speakers.index(role) + 1 if role in config.speakers else NOBODY
        text = marker_text(tokenizer, role, config.markers)
        for context in ("", "a\n") if plain else ("", "a\n", "a "):
            start, ids = text_ids(tokenizer, context.rstrip(" ")), text_ids(tokenizer, context + text)
            if ids[: len(start)] != start:
                continue  # the marker melts into the text before it, which the others cover
            own = tuple(ids[len(start) :])
            if not own or known.get(own, speaker) != speaker:
                raise PeftxError(
                    f"token-trails: the marker {text!r} of '{role}' is empty or that of another speaker",
                    hint="name the texts that open turns: markers={'user': 'User:', ...}",
                )
            known[own] = speaker
    if tokenizer.bos_token_id is not None:
        known[(int(tokenizer.bos_token_id),)] = NOBODY  # a new text in a packed row
    return [(speaker, list(ids)) for ids, speaker in known.items()]


def marker_text(tokenizer: PreTrainedTokenizerBase, role: str, given: dict[str, str]) -> str:
    """What opens a turn of `role`: what the rendering puts between two turns, less what the first ends with anyway."""
    if role in given:
        return given[role].strip()
    if tokenizer.chat_template is None:
        return f"{role.capitalize()}:"
    turns = [{"role": "user", "content": "first words"}, {"role": "assistant", "content": "second words"}]
    if role != "assistant":
        turns.append({"role": role, "content": "third words"})
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    shorter = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False))
    before, own = turns[-2]["content"], turns[-1]["content"]
    between = text.rpartition(before)[2].partition(own)[0] if own in text else ""
    end = shorter.rpartition(before)[2]
    rest = between.removeprefix(end).strip() or between.strip()
    if not rest:
        raise PeftxError(
            f"token-trails: the chat template writes nothing before a turn of '{role}'",
            hint=f"markers={{'{role}': ...}}",
        )
    return rest
