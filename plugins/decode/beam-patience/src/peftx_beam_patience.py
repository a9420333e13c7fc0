"""Beam patience: beam search that waits for p times as many finished texts as it has beams.

"Beam Decoding with Controlled Patience" (arXiv:2204.05424). Of the 2k best continuations of k beams,

    s(y v) = s(y) + log P(v | y)

those that end, and are among the first k, go into F; the k best of the others go on. The search stops when

    |F| >= k p          p = 1: the first k that finish are served, as beam search is implemented in most libraries

and gives the text of F with the largest s(y) / |y|^alpha (`length_penalty`). p < 1 stops earlier, p > 1 looks deeper.
The beams do not depend on p, so a larger p finds all that a smaller one finds.
"""

from __future__ import annotations

from math import ceil

import torch
from pydantic import Field
from torch import Tensor
from transformers import Cache

from peftx import Generation, ModelView, Plugin, PluginConfig, hookimpl
from peftx.errors import UnsupportedError
from peftx.toolkits.decoding import Prepared
from peftx.toolkits.decoding.text import check_writes

NEVER = -1e9
"""Added to the score of what is not to be chosen."""


class BeamPatienceConfig(PluginConfig):
    """Options of beam patience; the paper takes k = 5, p = 2 to translate, and k = 4, p = 0.5 to summarize news."""

    patience: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="p, finished texts to wait for, for each beam"
    )
    beams: int = Field(
        5, ge=1, description="k, where a request names no `num_beams`; one that samples has none then"
    )


class Search:
    """The beams of a batch, and what has finished.

    Args:
        request: what is asked for. prepared: of its loop. patience: p.
    """

    def __init__(self, request: Generation, prepared: Prepared, patience: float) -> None:
        self.model, self.prepared, self.config = request.model, prepared, prepared.config
        self.ids, self.kwargs = prepared.input_ids, dict(prepared.model_kwargs)  # [B * k, L]
        self.k, self.start = self.config.num_beams, self.ids.shape[1]
        self.wanted, eos = self.k * patience, self.config.eos_token_id
        ends = 0 if eos is None else len(eos) if isinstance(eos, list) else 1
        self.width = max(2, 1 + ends) * self.k  # so that k are left, if all that can end do
        self.F: list[list[tuple[float, Tensor]]] = [[] for _ in range(len(self.ids) // self.k)]
        self.s = torch.zeros(len(self.F), self.k, device=self.ids.device)
        self.s[:, 1:] = NEVER  # the beams are alike at first

    def loop(self) -> Tensor:
        """[B * num_return_sequences, L + new], the best of each prompt first."""
        goes_on, fed = True, self.prepared.pending
        while goes_on:
            goes_on, fed = self.step(fed), 1
        count, fill = self.config.num_return_sequences, self.config.pad_token_id
        best = [row for b in range(len(self.F)) for _, row in self.ranked(b)[:count]]
        out = best[0].new_full((len(best), max(map(len, best))), 0 if fill is None else fill)
        for place, row in zip(out, best, strict=True):
            place[: len(row)] = row
        return out

    def step(self, fed: int) -> bool:
        """One token more; whether the search goes on. `fed`: columns that are not in the cache."""
        B, k = self.s.shape
        lengths = fed if self.kwargs.get("use_cache") else None
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=lengths,
            is_first_iteration=self.ids.shape[1] == self.start,
            **self.kwargs,
        )
        output = self.model(**inputs, return_dict=True)
        pair = self.model.config.is_encoder_decoder
        self.kwargs = self.model._update_model_kwargs_for_generation(
            output, self.kwargs, is_encoder_decoder=pair
        )
        log_p = self.prepared.processors(self.ids, output.logits[:, -1].float().log_softmax(-1))
        s = (log_p.view(B, k, -1) + self.s[..., None]).flatten(1)  # [B, k V]
        if self.config.do_sample:
            at = torch.multinomial(s.softmax(-1), self.width)
        else:
            at = s.topk(self.width).indices
        s, beam, token = s.gather(1, at), at // log_p.shape[1], at % log_p.shape[1]  # [B, width]
        first = k * torch.arange(B, device=at.device)[:, None]
        rows = torch.cat((self.ids[first + beam], token[..., None]), 2)  # [B, width, L + 1]
        ends = self.prepared.criteria(rows.flatten(0, 1), None).view(B, -1)
        self.finish(rows, s, ends)
        self.s, going = (s + NEVER * ends).topk(k)
        self.ids = rows.gather(1, going[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)
        for cache in self.kwargs.values():
            if isinstance(cache, Cache):
                cache.reorder_cache((first + beam.gather(1, going)).flatten())
        return not bool(ends.all()) and any(len(found) < self.wanted for found in self.F)

    def finish(self, rows: Tensor, s: Tensor, ends: Tensor) -> None:
        """Put what ends, and is among the first k, into F, where more is waited for."""
        scores = s / (rows.shape[2] - self.start) ** self.config.length_penalty
        chosen = ends & (s > NEVER / 2)
        for found, row, score, end in zip(self.F, rows, scores.tolist(), chosen.tolist(), strict=True):
            if len(found) < self.wanted:
                found += [(score[j], row[j]) for j in range(self.k) if end[j]]

    def ranked(self, b: int) -> list[tuple[float, Tensor]]:
        """F of a prompt, the best first, and behind it what did not finish."""
        scores = self.s[b] / (self.ids.shape[1] - self.start) ** self.config.length_penalty
        running = zip(scores.tolist(), self.ids.view(len(self.F), self.k, -1)[b], strict=True)
        return sorted(self.F[b], key=lambda found: -found[0]) + list(running)


class BeamPatience(Plugin):
    """See the module."""

    Config = BeamPatienceConfig
    refuses = {"bert": "it writes no text", "vit": "it writes no text"}
    config: BeamPatienceConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model, alone=False)

    @hookimpl
    def decode(self, request: Generation) -> Tensor | None:
        config, p = request.generation_config, self.config.patience
        asked = config.num_beams
        if asked is None and config.do_sample:
            return None  # sampling has no beams to wait for
        k = asked or self.config.beams
        refused = {
            "a streamer: no text is certain before the end": request.streamer is not None,
            "return_dict_in_generate": config.return_dict_in_generate,
            "early_stopping='never', another rule of when to stop": config.early_stopping == "never",
            f"num_return_sequences over k p = {k * p:g}": (config.num_return_sequences or 1) > ceil(k * p),
        }
        if found := [what for what, wrong in refused.items() if wrong]:
            raise UnsupportedError(
                f"beam-patience does not support {' and '.join(found)}", hint="change the option"
            )
        config.num_beams = k

        def loop(prepared: Prepared) -> Tensor:
            search = Search(request, prepared, p)
            out = search.loop()
            request.add("finished", sum(map(len, search.F)))
            request.state["beam-patience"] = [search.ranked(b)[0][0] for b in range(len(search.F))]
            return out

        try:
            return request.run(loop)
        finally:
            config.num_beams = asked
