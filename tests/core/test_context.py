"""What a delta knows of the call that it runs in: tokens, pads, columns of its own, values that go with the cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import peftx
from peftx import AttentionEdit, CallEdit, Claim, Delta, ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.calls import call_of, listening
from peftx.testing.models import tiny, tiny_tokenizer

IDS = torch.arange(3, 15).reshape(2, 6)


class SumOfIds(Delta):
    """y + scale * (sum of all ids up to here): wrong as soon as a token before is forgotten, or a pad counted."""

    def __init__(self, call: Any, owner: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.01))
        self.call, self.owner = call, owner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ids, real = self.call.ids, self.call.real
        if ids is None:
            return y
        all_ids = self.call.carry(self.owner, ids * real)  # [B, R + T]
        sums = all_ids.cumsum(1)[:, -ids.shape[1] :].to(y.dtype)
        return y + self.scale * sums[..., None]


class Sums(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding().attach(SumOfIds(model.call, model.owner))


class Deep(Plugin):
    """In a layer behind others, whose rows of this call are in the cache already."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(SumOfIds(model.call, f"{model.owner}.{site.layer}"))


class Rows(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Prompt(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Rows(model.hidden_size))


def stack_of(*plugins: Plugin, arch: str = "llama") -> Stack:
    return Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "plugins",
    [(Sums(),), (Prompt(), Sums()), (Deep(),)],
    ids=["alone", "behind soft tokens", "in every layer"],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_next"])
@torch.no_grad()
def test_values_go_with_the_cache(arch: str, plugins: tuple[Plugin, ...]) -> None:
    model = stack_of(*plugins, arch=arch).model
    whole = model(IDS).logits
    out = model(IDS[:, :4], use_cache=True)
    for at in (4, 5):
        out = model(IDS[:, at : at + 1], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_values_follow_beams_and_pads() -> None:
    model = stack_of(Sums()).model
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS[:1]), 1)
    mask = (padded > 0).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    alone = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    beside = model.generate(torch.cat((padded, padded)), attention_mask=torch.cat((mask, mask)), **options)
    assert torch.equal(beside[0, 3:], alone[0])
    uncached = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), use_cache=False, **options)
    assert torch.equal(uncached, alone)


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_values_is_refused() -> None:
    stack = stack_of(Sums())
    with stack.disabled():
        cache = stack.model(IDS, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="6 rows, and what goes with them is known of 0"):
        stack.model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("plugins", [[], [Sums()]], ids=["nobody else", "beside a plugin"])
@torch.no_grad()
def test_somebody_may_listen_for_a_while(plugins: list[Plugin]) -> None:
    model = stack_of(*plugins).model
    before, plain, seen = call_of(model), model(IDS).logits, []
    with listening(model) as call:
        model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(call.ids))
        with listening(model) as same:
            model(IDS)
        model(IDS.flip(1))
    assert same is call
    assert all(torch.equal(one, two) for one, two in zip(seen, (IDS, IDS.flip(1)), strict=True))
    assert call_of(model) is before
    assert len(model._forward_hooks) == len(plugins)
    assert torch.equal(model(IDS).logits, plain), "who heard before still does"


@torch.no_grad()
def test_it_tells_what_the_edits_made_of_the_call() -> None:
    class Backwards(CallEdit):
        def before(self, call: dict[str, Any]) -> dict[str, Any]:
            return {**call, "input_ids": call["input_ids"].flip(1)}

    class Turned(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.around(Backwards())

    turned = stack_of(Turned(), Sums()).model
    torch.testing.assert_close(turned(IDS).logits, stack_of(Sums()).model(IDS.flip(1)).logits)


def test_a_plugin_that_is_folded_for_good_asks_no_more() -> None:
    """What stays is a plain model, which may stand in another stack."""

    class Asks(Delta):
        def __init__(self, call: Call, width: int) -> None:
            super().__init__()
            self.z, self.call = nn.Parameter(torch.full((width,), 2.0)), call

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y * self.z

        def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight * self.z[:, None], bias

    class Folds(Plugin):
        claims = {Claim.MERGEABLE}

        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.linears("mlp.down"):
                site.attach(Asks(model.call, site.out_features))

    stack = stack_of(Folds())
    stack.merge(keep=False)
    assert call_of(stack.model) is None
    assert not stack.model._forward_hooks
    Stack(stack.model, [Sums()], tokenizer=tiny_tokenizer())


class ByRow(Delta):
    """y + shift of the row's own column."""

    def __init__(self, call: Any, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, width, generator=torch.Generator().manual_seed(1)))
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kind = self.call.batch.get("kind")
        return y if kind is None else y + self.table[kind][:, None]


class Kinds(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("kind")
        site = model.embedding()
        site.attach(ByRow(model.call, site.out_features))


@torch.no_grad()
def test_columns_reach_calls_and_generation() -> None:
    stack = stack_of(Kinds())
    kind = torch.tensor([1, 3])
    both = stack.model(IDS, kind=kind).logits
    each = torch.cat([stack.model(IDS[i : i + 1], kind=kind[i : i + 1]).logits for i in (0, 1)])
    torch.testing.assert_close(both, each)
    assert not torch.allclose(both, stack.model(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with stack.columns(kind=kind):
        torch.testing.assert_close(stack.model(IDS).logits, both)
        found = stack.model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for row in (0, 1):
        with stack.columns(kind=kind[row : row + 1]):
            one = IDS[row : row + 1]
            own = stack.model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(found[row], own[0])
    with pytest.raises(PeftxError, match="no plugin reads a column 'knd'"), stack.columns(knd=kind):
        pass


def test_columns_come_with_the_rows_and_a_bundle_reads_them_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "kind": n % 4} for n in range(8)]
    stack = stack_of(Kinds())
    before = next(stack.ledger.parameters("kinds")).clone()
    stack.train(rows, steps=4, batch_size=4, learning_rate=0.1)
    moved = (next(stack.ledger.parameters("kinds")) - before).abs().sum(1)
    assert (moved > 0).all(), "each row's own kind trains"
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        kind = torch.tensor([0, 2])
        assert torch.equal(again.model(IDS, kind=kind).logits, stack.model(IDS, kind=kind).logits)


def test_two_plugins_with_one_column_are_refused_and_removal_withdraws_it() -> None:
    with pytest.raises(PeftxError, match="both read a column 'kind'"):
        stack_of(Kinds(), ("other", Kinds()))  # type: ignore[arg-type]
    stack = stack_of(Kinds())
    stack.remove("kinds")
    with pytest.raises(PeftxError, match="no plugin reads"), stack.columns(kind=torch.tensor([1])):
        pass


def test_layers_that_are_recomputed_carry_nothing_into_the_next_call() -> None:
    class Adds(SumOfIds):
        def around(self, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(super().forward(hidden_states, hidden_states), *args, **kwargs)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    class Inside(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.blocks("layer")[0].attach(Adds(model.call, model.owner))

    stack = stack_of(("inside", Inside()))  # type: ignore[arg-type]
    stack.model.train()
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    stack.model(IDS, labels=IDS).loss.backward()
    stack.model.eval()
    with stack.disabled(), torch.no_grad():
        cache = stack.model(IDS[:, :3], use_cache=True).past_key_values
    assert len(cache.layers) == 2


def test_layers_that_are_recomputed_see_the_same_call() -> None:
    class Inside(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.column("kind")
            for site in model.linears("mlp.down"):
                site.attach(ByRow(model.call, site.out_features))

    found = []
    for recompute in (False, True):
        stack = stack_of(Inside())
        stack.model.train()
        if recompute:
            stack.model.activation_checkpointing_enable()
        stack.model(IDS, labels=IDS, kind=torch.tensor([1, 3])).loss.backward()
        found.append([p.grad for p in stack.ledger.parameters("inside")])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_values_of_recomputed_layers_stay_out_of_the_next_cache() -> None:
    class Inside(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.linears("mlp.down"):
                site.attach(SumOfIds(model.call, model.owner))

    stack = stack_of(Inside())
    stack.model.train()
    stack.model.activation_checkpointing_enable()
    stack.model(IDS, labels=IDS, use_cache=False).loss.backward()
    stack.model.eval()
    with torch.no_grad(), stack.disabled():
        cache = stack.model(IDS[:, :3], use_cache=True).past_key_values
    assert len(cache.layers) == 2, "the model's own, and nothing of the plugin that is off"


def test_a_copy_of_the_model_knows_of_no_call() -> None:
    stack = stack_of(Sums(), Kinds())
    rows = 2 * stack.model.get_input_embeddings()(IDS).detach().requires_grad_()  # which no copy can hold
    stack.model(inputs_embeds=rows, labels=IDS, kind=torch.tensor([1, 3]))
    twin = copy.deepcopy(stack.model)
    found = [m.call for m in twin.modules() if isinstance(m, SumOfIds | ByRow)]
    assert [(call.ids, call.shape, call.batch) for call in found] == [(None, None, {})] * 2
    with torch.no_grad():
        own = twin(IDS, kind=torch.tensor([1, 3])).logits
        torch.testing.assert_close(own, stack.model(IDS, kind=torch.tensor([1, 3])).logits)
        assert not torch.allclose(own, twin(IDS, kind=torch.tensor([3, 1])).logits)


def test_pads_of_both_sides_of_an_encoder_and_its_decoder() -> None:
    seen: list[tuple[Any, Any]] = []

    class Look(Delta):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.call = call

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            real = self.call.decoder_real
            seen.append((self.call.real, None if real is None else self.call.rows(real, x)))
            return y

    class Looks(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.site("norm.final", tower="decoder").attach(Look(model.call))

    model = stack_of(Looks(), arch="t5").model
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = torch.tensor([[7, 8, 9], [7, -100, -100]])
    with torch.no_grad():
        model(IDS, attention_mask=mask, labels=labels)
        own = torch.tensor([[1, 1, 0], [1, 1, 1]])
        model(IDS, attention_mask=mask, decoder_attention_mask=own, labels=labels)
        model(IDS, attention_mask=mask, decoder_input_ids=labels.clamp(min=0))
        read = model.get_encoder()(IDS, attention_mask=mask)
        model(encoder_outputs=read, attention_mask=mask, labels=labels)
    *whole, (source, alone) = seen
    assert all(torch.equal(real, mask.bool()) for real, _ in whole)
    (_, by_labels), (_, by_mask), (_, unknown) = whole
    assert torch.equal(by_labels, labels != -100)
    assert torch.equal(by_mask, own.bool())
    assert unknown is None
    assert source is None, "its tokens are not in the call"
    assert torch.equal(alone, labels != -100)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_reference_between_the_two_passes_changes_no_gradient(recompute: bool) -> None:
    class Inside(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.column("kind")
            for site in model.linears("mlp.down"):
                site.attach(ByRow(model.call, site.out_features))

    def gradients(*, beside: bool) -> list[Tensor]:
        stack = stack_of(Inside())
        stack.model.train()
        if recompute:
            stack.model.activation_checkpointing_enable()
        loss = stack.model(IDS, labels=IDS, kind=torch.tensor([1, 3])).loss
        if beside:
            with torch.no_grad():
                stack.model(IDS.flip(1), kind=torch.tensor([0, 2]))
        loss.backward()
        return [p.grad for p in stack.ledger.parameters("inside") if p.grad is not None]

    for alone, among in zip(gradients(beside=False), gradients(beside=True), strict=True):
        torch.testing.assert_close(among, alone)


def test_an_encoder_that_runs_by_itself_hears_nothing_of_the_step_before() -> None:
    """`generate` calls it so, on rows of its own."""
    stack = stack_of(Kinds(), arch="t5")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
    plain = torch.stack(stack.model.generate(IDS, **options).logits)
    stack.model(input_ids=IDS[:1], labels=IDS[:1], kind=torch.tensor([1])).loss.backward()
    torch.testing.assert_close(torch.stack(stack.model.generate(IDS, **options).logits), plain)


# -- where soft tokens stand -----------------------------------------------------------------------------------------


class Seen(Delta):
    """Notes the ids as the first layer sees them."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.found: list[list[int]] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.call.ids is not None
        self.found = self.call.rows(self.call.ids, x, fill=-1).tolist()
        return y


class Looks(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.seen = model.blocks("layer")[0].attach(Seen(model.call))


class RowsAfterBos(Rows):
    after_bos = True


class PromptAfterBos(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(RowsAfterBos(model.hidden_size))


@pytest.mark.parametrize(
    ("arch", "prompt", "expected"),
    [
        ("llama", Prompt, [[-1, -1, -1, 5, 6, 7, 8], [2, -1, -1, -1, 5, 6, 7]]),
        ("llama", PromptAfterBos, [[5, -1, -1, -1, 6, 7, 8], [2, 5, -1, -1, -1, 6, 7]]),
        ("bert", Prompt, [[5, -1, -1, -1, 6, 7, 8], [2, -1, -1, -1, 5, 6, 7]]),
        ("t5", Prompt, [[-1, -1, -1, 5, 6, 7, 8], [2, -1, -1, -1, 5, 6, 7]]),
    ],
)
@torch.no_grad()
def test_what_belongs_to_tokens_stands_beside_soft_tokens(
    arch: str, prompt: type[Plugin], expected: list[list[int]]
) -> None:
    looks = Looks()
    model = stack_of(prompt(), looks, arch=arch).model
    ids = torch.tensor([[5, 6, 7, 8], [2, 5, 6, 7]])
    decoder = {"decoder_input_ids": ids} if arch == "t5" else {}
    model(input_ids=ids, attention_mask=(ids != 2).long(), **decoder)
    assert looks.seen.found == expected


@torch.no_grad()
def test_an_encoder_that_generate_runs_alone_is_a_call() -> None:
    """Columns, tokens and what stands around calls act on it as in a forward pass of the whole model."""
    noted: list[tuple[int, ...] | None] = []

    class Notes(CallEdit):
        def before(self, call: dict[str, Any]) -> dict[str, Any]:
            noted.append(None if call.get("input_ids") is None else tuple(call["input_ids"].shape))
            return call

    class Watches(Kinds):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            super().inject(model)
            model.around(Notes())

    stack = stack_of(("kinds", Watches()), arch="t5")  # type: ignore[arg-type]
    kind, start = torch.tensor([1, 3]), torch.full((2, 1), 2)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    with stack.columns(kind=kind):
        found = stack.model.generate(IDS, **options, return_dict_in_generate=True).logits[0]
        expected = stack.model(IDS, decoder_input_ids=start).logits[:, 0]
    torch.testing.assert_close(found, expected)
    assert noted == [(2, 6), None, None, None, (2, 6)], (
        "once each, and not inside the whole model's call again"
    )
    plain = stack.model.generate(IDS, **options, return_dict_in_generate=True).logits[0]
    assert not torch.allclose(found, plain)


@torch.no_grad()
def test_values_of_an_encoders_tokens_are_not_carried_by_the_decoders_cache() -> None:
    model = stack_of(Sums(), arch="t5").model
    start = torch.full((2, 1), 2)
    expected = model(IDS, decoder_input_ids=start).logits
    out = model.generate(
        IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(out.logits[0], expected[:, 0])
    cache = model(IDS, decoder_input_ids=start, use_cache=True).past_key_values
    again = model(IDS, decoder_input_ids=start, past_key_values=cache).logits
    both = model(IDS, decoder_input_ids=torch.cat((start, start), 1)).logits
    torch.testing.assert_close(again[:, 0], both[:, 1])


@torch.no_grad()
def test_states_carry_nothing() -> None:
    model = stack_of(Sums(), arch="mamba").model
    out = model(IDS, use_cache=True)
    with pytest.raises(UnsupportedError, match="sums: mamba keeps states"):
        model(IDS[:, :1], cache_params=out.cache_params)


# -- columns with a value a token, and values along the keys of an attention -------------------------------------------


class Marked(AttentionEdit):
    """Keys whose marks are 0 weigh a tenth."""

    def __init__(self, call: Call, owner: str) -> None:
        super().__init__()
        self.call, self.owner = call, owner

    def probabilities(self, p: Tensor) -> Tensor:
        marks, real = self.call.tokens("marks", fill=1), self.call.real
        if marks is None or real is None:
            return p
        light = self.call.keys(self.call.carry(self.owner, (marks == 0) & real), p)
        p = p * torch.where(light.bool(), 0.1, 1.0)[:, None, None]
        return p / p.sum(-1, keepdim=True)


class Marks(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("marks")
        for site in model.attention_sites():
            site.attend(Marked(model.call, model.owner))


MARKS = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def logits_of(stack: Stack, ids: Tensor, marks: Tensor, **options: Any) -> Tensor:
    """Of six generated tokens, [B, 6, V]."""
    more = {"return_dict_in_generate": True, "output_logits": True}
    with stack.columns(marks=marks):
        out = stack.model.generate(ids, attention_mask=(ids != 2).long(), **GREEDY, **more, **options)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("prompt", [None, Prompt, PromptAfterBos])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_next"])
@torch.no_grad()
def test_columns_with_a_value_a_token_reach_the_keys_of_every_step(
    arch: str, prompt: type[Plugin] | None
) -> None:
    plugins = (Marks(),) if prompt is None else (prompt(), Marks())
    stack = stack_of(*plugins, arch=arch)
    padded = torch.cat((torch.full((1, 2), 2), IDS[:1, :4]), 1)
    short = torch.cat((torch.zeros(1, 2, dtype=torch.int64), MARKS[:1, :4]), 1)
    found = logits_of(stack, torch.cat((IDS, padded)), torch.cat((MARKS, short)))
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(
        found, logits_of(stack, torch.cat((IDS, padded)), torch.cat((MARKS, short)), use_cache=False), **close
    )
    for row, (ids, marks) in enumerate(
        ((IDS[:1], MARKS[:1]), (IDS[1:], MARKS[1:]), (IDS[:1, :4], MARKS[:1, :4]))
    ):
        torch.testing.assert_close(found[row : row + 1], logits_of(stack, ids, marks), **close)
    everything = torch.ones_like(MARKS)
    assert not torch.allclose(found[:2], logits_of(stack, IDS, everything), atol=1e-3)


@pytest.mark.parametrize("prompt", [None, Prompt])
@torch.no_grad()
def test_keys_of_a_static_cache_and_of_a_window(prompt: type[Plugin] | None) -> None:
    plugins = (Marks(),) if prompt is None else (prompt(), Marks())
    for model in (tiny("llama"), tiny("mistral", sliding_window=8)):
        stack = Stack(model, plugins, tokenizer=tiny_tokenizer())
        expected = logits_of(stack, IDS, MARKS, use_cache=False)
        caches = ("dynamic", "static") if model.config.model_type == "llama" else ("dynamic",)
        for cache in caches:
            found = logits_of(stack, IDS, MARKS, cache_implementation=cache)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class FrontKeys(AttentionEdit):
    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat((torch.ones_like(x[:, :, :2]), x), 2) for x in (key, value))  # type: ignore[return-value]


class Front(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.attention_sites():
            site.attend(FrontKeys())


@torch.no_grad()
def test_rows_that_plugins_put_before_the_keys_are_no_tokens() -> None:
    stack = stack_of(Marks(), Front())
    expected = logits_of(stack, IDS, MARKS, use_cache=False)
    torch.testing.assert_close(logits_of(stack, IDS, MARKS), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedError, match="static cache"):
        logits_of(stack, IDS, MARKS, cache_implementation="static")


@pytest.mark.parametrize("plugins", [(Marks(),), (Prompt(), Marks())], ids=["alone", "behind soft tokens"])
@torch.no_grad()
def test_a_column_of_a_text_goes_on_in_later_calls(plugins: tuple[Plugin, ...]) -> None:
    stack = stack_of(*plugins)
    with stack.columns(marks=MARKS):
        whole = stack.model(IDS).logits
        out = stack.model(IDS[:, :4], use_cache=True)
        out = stack.model(IDS[:, 4:], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits, whole[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_column_of_one_call_belongs_to_its_tokens() -> None:
    """A loop of the caller's own hands the marks of each call's tokens over with them."""
    stack = stack_of(Marks())
    whole = stack.model(IDS, marks=MARKS).logits
    out = stack.model(IDS[:, :4], marks=MARKS[:, :4], use_cache=True)
    out = stack.model(IDS[:, 4:], marks=MARKS[:, 4:], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits, whole[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(PeftxError, match=r"'marks' has a value for 4 tokens, and the call 6"):
        stack.model(IDS, marks=MARKS[:, :4])


# -- once for a cache ------------------------------------------------------------------------------------------------


class Costly(CallEdit):
    """Adds to all embeddings what it has worked out, slowly, of its column."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.times, self.scale = call, 0, nn.Parameter(torch.tensor(0.3))

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        self.call.once("costly", self.work)
        return call

    def work(self) -> Tensor:
        self.times += 1
        kind = self.call.batch.get("kind", torch.zeros(1))
        return kind * self.scale


class Shifted(Delta):
    def __init__(self, costly: Costly) -> None:
        super().__init__()
        self.costly = (costly,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift = self.costly[0].call.once("costly", self.costly[0].work)
        return y + shift[:, None, None]


class Once(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("kind")
        self.costly = Costly(model.call)
        model.around(self.costly)
        for site in model.linears("mlp.down"):
            site.attach(Shifted(self.costly))


@torch.no_grad()
def test_what_is_worked_out_once_for_a_cache() -> None:
    once = Once()
    stack = stack_of(once)
    kinds = torch.tensor([1, 3])
    options = {**GREEDY, "num_beams": 2}
    with stack.columns(kind=kinds):
        found = stack.model.generate(IDS, **options)
        assert once.costly.times == 1
        again = stack.model.generate(IDS, **options)
        assert once.costly.times == 2, "another cache"
        uncached = stack.model.generate(IDS, **options, use_cache=False)
        assert once.costly.times == 8
    assert torch.equal(found, again)
    assert torch.equal(found, uncached)
    with stack.columns(kind=kinds.flip(0)):
        assert not torch.equal(stack.model.generate(IDS, **options), found)


@torch.no_grad()
def test_a_cache_that_begins_anew_or_lost_rows_has_nothing_kept() -> None:
    once = Once()
    stack, kinds = stack_of(once), torch.tensor([1, 3])
    cache = DynamicCache()
    stack.model(IDS, kind=kinds, past_key_values=cache)
    stack.model(IDS[:, :1], kind=kinds, past_key_values=cache)
    assert once.costly.times == 1
    cache.batch_select_indices(torch.tensor([1]))
    one = stack.model(IDS[1:, :1], kind=kinds[1:], past_key_values=cache).logits
    assert once.costly.times == 2
    own = DynamicCache()
    stack.model(IDS[1:], kind=kinds[1:], past_key_values=own)
    stack.model(IDS[1:, :1], kind=kinds[1:], past_key_values=own)
    expected = stack.model(IDS[1:, :1], kind=kinds[1:], past_key_values=own).logits
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    cache.reset()
    stack.model(IDS[:1], kind=kinds[:1], past_key_values=cache)
    assert once.costly.times == 4, "another text"


def test_what_has_gradients_is_worked_out_anew() -> None:
    once = Once()
    stack = stack_of(once)
    cache = stack.model(IDS, kind=torch.tensor([1, 3]), use_cache=True).past_key_values
    for times in (2, 3):
        stack.model(IDS[:, :1], kind=torch.tensor([1, 3]), past_key_values=cache)
        assert once.costly.times == times
    assert not any(name.startswith("peftx") for name in vars(cache)), "no graph lies in a cache"


def test_what_is_worked_out_once_is_seen_by_recomputed_layers_and_by_no_copy() -> None:
    found = []
    for recompute in (False, True):
        once = Once()
        stack = stack_of(once)
        stack.model.train()
        if recompute:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model(IDS, labels=IDS, kind=torch.tensor([1, 3])).loss.backward()
        assert once.costly.times == 1
        found.append(once.costly.scale.grad)
        copy.deepcopy(stack.model)
    torch.testing.assert_close(*found)
    assert found[0].abs() > 0


@torch.no_grad()
def test_between_calls_nothing_is_remembered() -> None:
    once = Once()
    stack = stack_of(once)
    for times in (1, 2):
        once.costly.call.once("costly", once.costly.work)
        assert once.costly.times == times
    stack.model(IDS, kind=torch.tensor([1, 3]))
    assert once.costly.times == 3


# -- columns of a length of their own --------------------------------------------------------------------------------


class SumOfNotes(Delta):
    """y + scale * (sum of the row's notes, whose number is its own)."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.01))
        self.call = call
        self.seen: list[list[list[int]]] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        notes = self.call.batch.get("notes")
        if notes is None:
            return y
        self.seen.append(notes.tolist())
        return y + self.scale * notes.clamp(min=0).sum(1)[:, None, None].to(y.dtype)


class Notes(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("notes", own_length=True)
        self.delta = model.embedding().attach(SumOfNotes(model.call))


def test_columns_of_a_length_of_their_own_come_with_the_rows() -> None:
    rows = [
        {"prompt": "a", "completion": "b", "notes": [7]},
        {"prompt": "ab", "completion": "c", "notes": [5, 0, 9, 4, 2, 2, 3, 8]},
    ]
    notes = Notes()
    stack = stack_of(notes)
    stack.train(rows, steps=1, batch_size=2)
    (batch,) = notes.delta.seen
    assert sorted(batch) == [[5, 0, 9, 4, 2, 2, 3, 8], [7, *[-1] * 7]]


def test_what_a_recomputed_layer_carries_is_not_taken_for_a_later_calls() -> None:
    stack = stack_of(Deep())
    stack.model.train()
    stack.model.activation_checkpointing_enable()
    stack.model(IDS, labels=IDS).loss.backward()
    stack.model.eval()
    with stack.disabled("deep"), torch.no_grad():
        cache = stack.model(IDS[:1], use_cache=True).past_key_values
    assert len(cache.layers) == 2
