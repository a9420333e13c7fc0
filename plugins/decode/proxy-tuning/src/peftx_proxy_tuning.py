"""Proxy-tuning: a large model writes as if it were tuned, by what tuning changed in a small one.

"Tuning Language Models by Proxy" (arXiv:2401.08565). For the stack's model M, a small tuned model M+ (the expert) and
the same one untuned, M- (the anti-expert), of one vocabulary, and their logits of the next token,

    s = s_M + alpha (s_M+ - s_M-)        p = softmax(s), in proportion to p_M (p_M+ / p_M-)^alpha

before temperature and nucleus. Nothing trains, and no weight of M is looked at. An expert that was tuned on a chat's
form reads the prompt in it (`template`); what is written is common to the three, and each keeps a cache of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftx import Claim, Generation, ModelView, Plugin, PluginConfig, Stack, companion, hookimpl
from peftx.engines.data import Collator
from peftx.errors import ArchitectureError, ConflictError, OptionError, UnsupportedError
from peftx.kernel.objective import pad_of
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.text import ids_for

OWN = "own"


class ProxyTuningConfig(PluginConfig):
    """Options of proxy-tuning."""

    expert: str = Field(
        OWN,
        description="M+, the small tuned model: a folder, a hub id, a bundle, or `own`, the stack's model",
    )
    antiexpert: str = Field(OWN, description="M-, the small model before it was tuned: the same")
    alpha: float = Field(
        1.0, allow_inf_nan=False, description="alpha, how far the logits go along the difference of the two"
    )
    template: str | None = Field(
        None, description="what the expert reads in the prompt's place, such as '[INST] {prompt} [/INST]'"
    )

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str | None) -> str | None:
        if template is not None and "{prompt}" not in template:
            raise ValueError("it has no {prompt}, which the prompt would stand for")
        return template


class Reader:
    """A companion beside the loop, with a cache of its own.

    The loop may go on with other rows than before (beams): the cache follows, by what is written in them.

    Args:
        model: the companion. prompt, mask: int64 [B, S], what it reads of each prompt (by its encoder, if it has one).
        columns: of the loop's rows that the prompt stands for.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, mask: Tensor, columns: int) -> None:
        self.model, self.columns = model, columns
        self.prompt, self.mask = prompt.to(model.device), mask.to(model.device)
        pair, takes = model.config.is_encoder_decoder, inspect.signature(model.forward).parameters
        self.encoded = model.get_encoder()(self.prompt, attention_mask=self.mask)[0] if pair else None
        self.placed = "position_ids" in takes and not pair
        self.given: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in takes:
            self.given["logits_to_keep"] = 1
        self.cache: Cache | None = None
        self.read: Tensor | None = None
        """What the cache holds: for each row its prompt's number and its tokens, [N, 1 + K]."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the next token, float32 [N, V], for the loop's rows [N, L], N a multiple of B."""
        ids = ids.to(self.prompt.device)
        row = torch.arange(len(ids), device=ids.device) // (len(ids) // len(self.prompt))
        mask, given = self.mask[row], dict(self.given)
        if self.encoded is not None:
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=self.encoded[row])
        else:
            ids = torch.cat((self.prompt[row], ids[:, self.columns :]), 1)
            mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        if self.placed:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if known := self.follow(rows := torch.cat((row[:, None], ids), 1)):
            given["past_key_values"] = self.cache
        given |= {"next_sequence_length": ids.shape[1] - known, "is_first_iteration": not known}
        given = self.model.prepare_inputs_for_generation(ids, attention_mask=mask, **given)
        output = self.model(**given)
        self.cache = output.get("past_key_values")
        self.read = None if self.cache is None else rows  # Mamba keeps states, and reads all of it again
        return output.logits[:, -1].float()

    def follow(self, rows: Tensor) -> int:
        """Bring the cache into the order of `rows`; how many of their tokens are in it."""
        if self.read is None or self.cache is None or rows.shape[1] <= self.read.shape[1]:
            return 0
        same = (rows[:, None, : self.read.shape[1]] == self.read).all(2)  # [N, rows of the cache]
        if not bool(same.any(1).all()):
            return 0
        self.cache.reorder_cache(same.int().argmax(1))
        return self.read.shape[1] - 1


class Shift(LogitsProcessor):
    """s_M -> s_M + alpha (s_M+ - s_M-); beams add scores up, and get them as log-probabilities.

    Rows that do not begin with the request's prompts (of a batch that is decoded row by row) are prompts of their own,
    without pads.
    """

    def __init__(self, plugin: ProxyTuning, request: Generation) -> None:
        self.plugin, self.request, mask = plugin, request, request.attention_mask
        if mask is None:  # as `generate` decides it
            mask = request.prepare().model_kwargs.get("attention_mask", torch.ones_like(request.input_ids))
            mask = mask[:: len(mask) // len(request.input_ids)]
        self.begin(request.input_ids, mask[:, -request.input_ids.shape[1] :].long())

    def begin(self, prompt: Tensor, mask: Tensor) -> None:
        """Start with these prompts [B, T] and their mask."""
        self.prompt, self.readers = prompt, self.plugin.readers(self.request, prompt, mask)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies, rest = divmod(len(input_ids), len(self.prompt))
        begins = input_ids[:: max(copies, 1), : self.prompt.shape[1]]
        if not self.request.model.config.is_encoder_decoder and (rest or not begins.equal(self.prompt)):
            if self.plugin.config.template:
                said = f"{self.plugin.owner}: rows that are decoded one by one are not put into a template"
                raise UnsupportedError(said, hint="one prompt, without pads")
            self.begin(input_ids, torch.ones_like(input_ids))
        plus, minus = (reader(input_ids).to(scores) for reader in self.readers)
        V = min(plus.shape[1], minus.shape[1], scores.shape[1])  # rows behind the vocabulary are padding
        shift = self.plugin.config.alpha * (plus[:, :V] - minus[:, :V])
        scores = scores + F.pad(shift, (0, scores.shape[1] - V))
        return scores.log_softmax(1) if (self.request.generation_config.num_beams or 1) > 1 else scores


class ProxyTuning(Plugin):
    """See the module."""

    Config = ProxyTuningConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    example = {"expert": OWN, "antiexpert": OWN}
    refuses = {"bert": "it writes no text", "vit": "it writes no text"}
    config: ProxyTuningConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.stack, self.owner, own = stack, model.owner, model.module
        if not {"expert", "antiexpert"} & self.config.model_fields_set:
            said = f"{model.owner}: neither expert nor antiexpert is named, so that nothing would change"
            raise OptionError(said, hint="expert='a small tuned model', antiexpert='the same before'")
        sources, shape_only = (self.config.expert, self.config.antiexpert), own.device.type == "meta"
        self.companions = [own if shape_only or s == OWN else companion(stack, s) for s in sources]
        for found in (own, *self.companions):
            if not found.can_generate() or found.config.is_encoder_decoder != own.config.is_encoder_decoder:
                said = f"{model.owner}: a {type(found).__name__} does not write beside a {type(own).__name__}"
                raise ArchitectureError(said, hint="three decoders, or three encoders with decoders")

    def check(self, stack: Stack) -> None:
        new = [id for id, other in stack.plugins.items() if Claim.CHANGES_VOCABULARY in other.claims]
        if new and any(found is not stack.model for found in self.companions):
            said = f"'{new[0]}' adds tokens, which the companions of '{self.owner}' do not know"
            raise ConflictError(said, hint="keep one of them")

    def readers(self, request: Generation, prompt: Tensor, mask: Tensor) -> list[Reader]:
        """Of the expert and the anti-expert, for prompts [B, T] and their mask."""
        found, config, columns = [], request.generation_config, prompt.shape[1]
        new = config.max_new_tokens or (config.max_length or columns) - columns
        for model, template in zip(self.companions, (self.config.template, None), strict=True):
            ids, real = self.in_form(template, prompt, mask) if template else (prompt, mask)
            limit, read = free_positions(model), ids.shape[1]
            need = max(read, new) if model.config.is_encoder_decoder else read + new
            if limit is not None and need > limit:
                said = f"{self.owner}: a companion reads {limit} tokens, and the text may have {need}"
                raise UnsupportedError(said, hint=f"{need - limit} tokens less")
            found.append(Reader(model, ids, real, columns))
        return found

    def in_form(self, template: str, prompt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts as texts, in the template, and tokens again: ids and mask [B, S]."""
        tokenizer, rows = self.stack.tokenizer, []
        for ids, real in zip(prompt, mask.bool(), strict=True):
            text = tokenizer.decode(ids[real], skip_special_tokens=True)
            rows.append({"input_ids": ids_for(self.stack, template.replace("{prompt}", text))})
        side: Any = "right" if self.stack.model.config.is_encoder_decoder else "left"
        batch = Collator(pad_of(self.stack.model, tokenizer), padding_side=side)(rows)
        return batch["input_ids"], batch["attention_mask"]

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        if unread := ", ".join(request.model_kwargs):
            said = f"{self.owner}: the companions read text, and the request brings {unread}"
            raise UnsupportedError(said, hint=f"leave it out, or stack.disabled('{self.owner}')")
        shift = Shift(self, request)
        request.logits_processors.insert(0, shift)  # before temperature, top-k and top-p
        try:
            return (yield)
        finally:
            request.logits_processors.remove(shift)
