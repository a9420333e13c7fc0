"""One request for text: what the `decode` hook of a plugin gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from peftx.errors import GenerationError, UnsupportedError
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.cache import StateCache
from peftx.toolkits.decoding.stopping import StopStrings


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What `model.generate` has ready when its loop starts; a replaced loop starts from here.

    Attributes:
        input_ids: [B, L] int64: the prompt, or the decoder's start tokens of an encoder-decoder model.
        processors: the generation config's own processors and warpers, then the plugins'.
        criteria: EOS, length, stop strings, then the plugins'. `criteria(ids, None)` -> [B] bool.
        config: all defaults filled in; `max_length` is the total length, prompt included.
        model_kwargs: what the model's forward gets beside the ids: `past_key_values`, `attention_mask` (None where
            nothing is padded), `position_ids`, `use_cache`, `encoder_outputs`, ...
        pending: how many of the last columns of `input_ids` are not in the cache yet.
    """

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    pending: int

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Next tokens [B] int64 from processed scores [B, V] float32: a draw under `do_sample`, else the argmax."""
        if self.config.do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
        return torch.argmax(scores, dim=-1)


@final
@dataclass(kw_only=True, eq=False)
class Generation:
    """One request for text. Wrappers of `decode` edit it before the loop runs; a replaced loop reads it.

    Attributes:
        model: a causal or an encoder-decoder language model.
        tokenizer: needed only for stop strings, and by plugins.
        input_ids: [B, T] int64. Padding on the left; an encoder-decoder model gets them as the encoder's input.
        attention_mask: [B, T], or [B, P + T] with a cache, see `past_key_values`. None: everything counts, as
            `model.generate` decides it.
        generation_config: copied, so edits stay in this request. Default: the model's.
        logits_processors: the plugins' own; they run after those that the generation config asks for.
        stopping_criteria: the plugins' own, beside EOS and lengths.
        past_key_values: P rows to start from; the run consumes it (`fork_cache` keeps the original). With a mask of
            [B, T] it holds the first P < T tokens of `input_ids`; with a mask of [B, P + T] it holds P rows of its
            own, such as a learned prefix. The mask is required, because the two read very differently.
        model_kwargs: extra tensors for the model's forward.
        streamer: gets the prompt, then each token.
        seed: makes sampling repeatable and leaves the global random state alone. None: the global state is used.
        stats: sums over all runs of this request: `model_calls`, `new_tokens` (columns, for a batch),
            `tokens_per_call`, and for drafts `draft_tokens`, `accepted_tokens`, `probe_calls`, `linearized_drafts`.
        state: scratch space for plugins, by plugin id.

    Raises:
        PeftxError: ids or mask of the wrong shape or dtype, or a filled cache without a mask.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    tokenizer: PreTrainedTokenizerBase | None = None
    attention_mask: torch.Tensor | None = None
    generation_config: GenerationConfig = field(default=None)  # __post_init__ fills it in
    logits_processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    past_key_values: Cache | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    streamer: BaseStreamer | None = None
    seed: int | None = None
    stats: dict[str, float] = field(default_factory=dict)
    state: dict[str, object] = field(default_factory=dict)
    _counting: bool = field(default=False, init=False, repr=False)
    _prepared: tuple[list[object], Prepared] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        chosen = self.model.generation_config if self.generation_config is None else self.generation_config
        self.generation_config = copy.deepcopy(chosen)
        if self.input_ids.dim() != 2 or self.input_ids.dtype != torch.int64 or self.input_ids.shape[1] == 0:
            raise GenerationError(
                f"input_ids: expected [B, T] int64 with T >= 1, got {tuple(self.input_ids.shape)} "
                f"{self.input_ids.dtype}"
            )
        self._pending()

    # --------------------------------------------------------------------------------------------------- runs
    def run_default(self) -> torch.Tensor:
        """`model.generate` with everything above.

        Returns:
            Token ids: [B, T + new] int64 with the prompt, or [B, 1 + new] of an encoder-decoder model's decoder.
            Where the config asks for `return_dict_in_generate`, the full output is in `state["generate"]`.
        """
        with self.seeded(), self.counting():
            output = self._generate(streamer=self.streamer)
        if not isinstance(output, torch.Tensor):
            self.state["generate"] = output
            output = output.sequences
        self._count_new(output.shape[1] - self._start_length())
        return output

    def run(self, loop: Callable[[Prepared], torch.Tensor]) -> torch.Tensor:
        """Run a loop of your own in place of `model.generate`'s: without gradients, seeded and counted.

        The loop calls `processors` and `criteria` once a token, streams to `self.streamer` if there is one, and
        returns [B, L + new].
        """

        def enter(  # the signature is the one that `generate(custom_generate=...)` calls
            model: PreTrainedModel,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> torch.Tensor:
            output = loop(
                Prepared(
                    input_ids=input_ids,
                    processors=logits_processor,
                    criteria=stopping_criteria,
                    config=generation_config,
                    model_kwargs=model_kwargs,
                    pending=input_ids.shape[1] if model.config.is_encoder_decoder else self._pending(),
                )
            )
            self._count_new(output.shape[1] - input_ids.shape[1])
            return output

        with self.seeded(), self.counting():
            return self._generate(custom_generate=enter, streamer=self.streamer)

    def prepare(self) -> Prepared:
        """What a loop would start from, without running one (an encoder-decoder model's encoder does run)."""
        caught: list[Prepared] = []

        def catch(prepared: Prepared) -> torch.Tensor:
            caught.append(prepared)
            return prepared.input_ids

        streamer, self.streamer = self.streamer, None  # the prompt is streamed by the real run
        try:
            self.run(catch)
        finally:
            self.streamer = streamer
        return caught[0]

    def warp(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply every processor: temperature, top-p, repetition penalty, minimum length, bad words, the plugins'.

        Args:
            ids: [B, L] int64, the tokens so far; each row's own prefix.
            scores: [B, V] raw logits of the next token.

        Returns:
            [B, V] float32. Softmax it to sample, or take the argmax (`Prepared.pick`).
        """
        return self._current().processors(ids, scores.to(torch.float32, copy=True))

    def finished(self, ids: torch.Tensor) -> torch.Tensor:
        """[B] bool: which rows of `ids` [B, L] end here (EOS, length, stop strings, the plugins' criteria)."""
        return self._current().criteria(ids, None)

    # ----------------------------------------------------------------------------------------------- contexts
    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the model's forward calls into `stats["model_calls"]`; nested use counts once."""
        if self._counting:
            yield
            return
        self.stats.setdefault("model_calls", 0.0)
        hook = self.model.register_forward_pre_hook(lambda _module, _inputs: self.add("model_calls", 1))
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
            hook.remove()

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Seed the random state inside and restore it after; nothing where `seed` is None."""
        if self.seed is None:
            yield
            return
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            yield

    def add(self, name: str, amount: float) -> None:
        """Add to one of `stats`."""
        self.stats[name] = self.stats.get(name, 0.0) + amount

    # ------------------------------------------------------------------------------------------------ private
    def _generate(
        self, *, custom_generate: Callable[..., torch.Tensor] | None = None, streamer: BaseStreamer | None
    ) -> Any:
        config, criteria = self.generation_config, self.stopping_criteria
        if config.stop_strings is not None:
            # `generate` drops the tokenizer when it is given a loop, so the criterion is built here for both ways.
            if self.tokenizer is None:
                raise GenerationError("stop_strings need a tokenizer, and this request has none")
            stop = StopStrings(self.tokenizer, config.stop_strings, self._start_length())
            criteria = StoppingCriteriaList([stop, *criteria])
            config = copy.deepcopy(config)
            config.stop_strings = None
        extra: dict[str, Any] = dict(self.model_kwargs)
        if self.attention_mask is not None:
            extra["attention_mask"] = self.attention_mask
        if self.past_key_values is not None:
            self._pending()  # the cache may have been consumed by an earlier run
            extra["past_key_values"] = self.past_key_values
        skipping: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.past_key_values, StateCache):
            extra["cache_params"] = extra.pop("past_key_values")
            skipping = self.model.register_forward_pre_hook(self.past_key_values.skip, with_kwargs=True)
        with skipping:
            return self.model.generate(
                self.input_ids,
                generation_config=config,
                logits_processor=LogitsProcessorList(self.logits_processors),
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
                custom_generate=custom_generate,
                **extra,
            )

    def _pending(self) -> int:
        """Columns of `input_ids` that are not in the cache; checks ids, mask and cache against each other."""
        batch, length = self.input_ids.shape
        rows = 0 if self.past_key_values is None else int(self.past_key_values.get_seq_length())
        if self.attention_mask is None:
            if rows:
                raise GenerationError(
                    f"a cache of {rows} rows needs an attention mask",
                    hint=f"[{batch}, {length}] if it holds the prompt's first {rows} tokens, "
                    f"[{batch}, {rows + length}] if its rows come before the prompt",
                )
            return length
        allowed = {rows + length} | ({length} if rows < length else set())
        if self.attention_mask.dim() != 2 or len(self.attention_mask) != batch:
            raise GenerationError(
                f"attention_mask: expected 2-D with {batch} rows, got {tuple(self.attention_mask.shape)}"
            )
        if self.attention_mask.shape[1] not in allowed:
            raise GenerationError(
                f"attention_mask: expected {' or '.join(map(str, sorted(allowed)))} columns for {length} prompt tokens "
                f"and {rows} cached rows, got {self.attention_mask.shape[1]}",
                hint="a run consumes its cache; give each run a `fork_cache` of it" if rows else None,
            )
        return length if self.attention_mask.shape[1] == rows + length else length - rows

    def _current(self) -> Prepared:
        """`prepare()`, kept until a processor, a criterion or the config changes."""
        key: list[object] = [
            dict(vars(self.generation_config)),
            [*self.logits_processors],
            [*self.stopping_criteria],
        ]
        if self._prepared is None or self._prepared[0] != key:
            prepared = self.prepare()
            self._prepared = (key, prepared)
            return prepared
        return self._prepared[1]

    def _start_length(self) -> int:
        return 1 if self.model.config.is_encoder_decoder else self.input_ids.shape[1]

    def _count_new(self, columns: int) -> None:
        self.add("new_tokens", columns)
        if self.stats.get("model_calls"):
            self.stats["tokens_per_call"] = self.stats["new_tokens"] / self.stats["model_calls"]


def require_single(generation: Generation, what: str) -> None:
    """Refuse requests that a loop over one row, one token after another, would not carry out faithfully.

    Args:
        generation: the request.
        what: the loop, for the message.

    Raises:
        UnsupportedError: names the option and the way out.
    """
    model, config = generation.model, generation.generation_config
    refused = {
        "an encoder-decoder model": model.config.is_encoder_decoder,
        "num_beams > 1": (config.num_beams or 1) > 1,
        "num_return_sequences > 1": (config.num_return_sequences or 1) > 1,
        "use_cache=False": config.use_cache is False,
        "return_dict_in_generate": bool(config.return_dict_in_generate),
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "a model in training mode (call model.eval())": model.training,
    }
    found = [name for name, wrong in refused.items() if wrong]
    if found:
        raise UnsupportedError(
            f"{what} does not support {', '.join(found)}", hint="change the option, or decode without drafts"
        )
    if len(generation.input_ids) != 1:
        raise UnsupportedError(
            f"{what} works on one sequence, got a batch of {len(generation.input_ids)}",
            hint="use batch size 1, or loop over the rows with `per_row`",
        )


def decode(stack: Stack, request: Generation) -> torch.Tensor:
    """Run one request through the stack's `decode` hooks: token ids [B, T + new]; ends in `model.generate` unless a
    plugin replaces the loop."""
    with torch.no_grad():
        ids: torch.Tensor = stack.call_nested("decode", request=request)
    return ids
