"""Keys and values that a network writes in front of an attention's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.kernel.parts import AttentionPart
from peftx.testing import example_inputs, tiny
from peftx.toolkits.injecting import NetworkPrefix, columns


class Writer(nn.Module):
    def __init__(self, widths: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.randn(3, widths))
        self.parts: list[slice] = []

    def forward(self, part: slice) -> Tensor:
        self.parts.append(part)
        return self.P[:, part].tanh()


class Written(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = model.attentions()
        self.parts = columns(model, sites)
        self.writer = model.keep("writer", Writer(self.parts[-1].stop))
        for site, part in zip(sites, self.parts, strict=True):
            site.attend(NetworkPrefix(self.writer, part, model.call, f"{model.owner}.{site.path}"))


def test_each_attention_has_columns_of_its_own_keys_first() -> None:
    plugin = Written()
    stack = Stack(tiny("deepseek_v3"), [plugin])  # values of another size than keys
    sizes = [stack.view("written").heads_of(site) for site in stack.view("written").attentions()]
    assert [part.stop - part.start for part in plugin.parts] == [
        n.kv_heads * (n.head_dim + n.value_dim) for n in sizes
    ]
    assert [part.start for part in plugin.parts] == [0, *(part.stop for part in plugin.parts[:-1])]
    edit, n = stack.ledger.of("written", AttentionPart)[1].module, sizes[1]
    key, value = torch.randn(2, n.kv_heads, 4, n.head_dim), torch.randn(2, n.kv_heads, 4, n.value_dim)
    with torch.no_grad():
        K, V = edit.keys_values(key, value)
    assert torch.equal(K[:, :, 3:], key)
    assert torch.equal(V[:, :, 3:], value)
    own = plugin.writer.P[:, plugin.parts[1]].tanh()
    keys = n.kv_heads * n.head_dim
    for head in range(n.kv_heads):
        at, behind = n.head_dim * head, keys + n.value_dim * head
        assert torch.equal(K[1, head, :3], own[:, at : at + n.head_dim])
        assert torch.equal(V[1, head, :3], own[:, behind : behind + n.value_dim])


def test_the_network_runs_once_for_a_cache_and_anew_with_gradients() -> None:
    plugin = Written()
    stack = Stack(tiny("llama"), [plugin])
    ids = example_inputs(stack.model)["input_ids"]
    with torch.no_grad():
        cache = DynamicCache(config=stack.model.config)
        stack.model(ids, past_key_values=cache)
        stack.model(ids[:, :1], past_key_values=cache)
    assert plugin.writer.parts == plugin.parts
    stack.model(ids)
    stack.model(ids)
    assert plugin.writer.parts == 3 * plugin.parts


def test_a_checkpointed_layer_finds_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        plugin = Written()
        stack = Stack(tiny("llama"), [plugin])
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model.train()
        ids = example_inputs(stack.model)["input_ids"]
        stack.model(ids, labels=ids).loss.backward()
        found.append(plugin.writer.P.grad)
    torch.testing.assert_close(*found)
