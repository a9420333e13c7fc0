"""Pointer networks: answers that are positions of the input, and a head that copies from it.

"Pointer Networks" (arXiv:1506.03134). An encoder makes e_1 .. e_n of the inputs P_1 .. P_n, a vector for the end is
learned, and a decoder has the state d_i at step i. A pointer gives each position a probability, however many there are:

    u_ij = v . tanh(W1 e_j + W2 d_i)        j = 1 .. n and the end
    p(C_i = j | C_1 .. C_i-1, P) = softmax_j(u_i)

The decoder's next input is the element that was pointed at, P_(C_i), and a learned vector at first. What is trained is
the cross entropy of the right positions. Answers may be longer or shorter than any that was trained on.

On a language model the pointer stands beside the head, e_j and d_i being its last hidden states: position i points at
the tokens so far, and a gate mixes what it says with the model's own word (pointer-generator; not in the paper):

    g_i  = sigmoid(w . d_i + b)
    p(w) = g_i softmax(logits_i)_w + (1 - g_i) sum_{j <= i: token j is w} softmax_j(u_i)
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, Evaluation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, UnsupportedError
from peftx.kernel.call import Call
from peftx.toolkits.decoding.text import check_writes


class PointerNetworkConfig(PluginConfig):
    """Options of the head, and of the experiment."""

    size: int = Field(64, ge=1, description="numbers in v, of the head on a language model")
    gate: float = Field(
        3.0, allow_inf_nan=False, description="b at the start: the model's own word counts sigmoid(b)"
    )
    task: Literal["sorting", "hull"] = Field(
        "sorting", description="of the experiment: numbers in order, or corners of a convex hull"
    )
    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (3, 4, 5, 6, 7), min_length=1, description="n that are trained on, in turn"
    )
    longest: int = Field(12, ge=3, description="largest n that is tested, from 3 on")
    width: int = Field(32, ge=1, description="d of encoder and decoder")
    steps: int = Field(3000, ge=1, description="of Adam; its rate falls to 0 along a line")
    batch: int = Field(64, ge=1, description="problems in a step")
    learning_rate: float = Field(0.02, gt=0, allow_inf_nan=False, description="of the first step")


IGNORE = -100
"""Behind the end of an answer."""


class Pointer(nn.Module):
    """u_ij = v . tanh(W1 e_j + W2 d_i).

    Args:
        width: of e and d. size: of v.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.W1, self.W2 = nn.Linear(width, size, bias=False), nn.Linear(width, size, bias=False)
        self.v = nn.Linear(size, 1, bias=False)

    def forward(self, keys: Tensor, d: Tensor) -> Tensor:
        """W1 e [B, n, size], d [B, m, width] -> u [B, m, n]."""
        u: Tensor = self.v(torch.tanh(keys[:, None] + self.W2(d)[:, :, None]))[..., 0]
        return u


# ------------------------------------------------------------------------------------------------ the paper's networks
class PointerNet(nn.Module):
    """Encoder, decoder and pointer. Position n is the end.

    Args:
        inputs: numbers in an element. width: d.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.LSTM(inputs, width, batch_first=True)
        self.decoder = nn.LSTM(inputs, width, batch_first=True)
        self.pointer = Pointer(width, width)
        self.start, self.end = nn.Parameter(torch.zeros(inputs)), nn.Parameter(torch.zeros(width))

    def encode(self, P: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Keys [B, n + 1, d], elements and one for the end [B, n + 1, inputs], the first input, the decoder's state."""
        e, state = self.encoder(P)
        keys = self.pointer.W1(torch.cat([e, self.end.expand(len(P), 1, -1)], 1))
        return keys, F.pad(P, (0, 0, 0, 1)), self.start.expand(len(P), 1, -1), state

    def forward(self, P: Tensor, C: Tensor) -> Tensor:
        """log p of each position behind the right ones before it: P [B, n, inputs], C [B, S] -> [B, S, n + 1]."""
        keys, elements, first, state = self.encode(P)
        given = elements[torch.arange(len(P))[:, None], C[:, :-1].clamp(min=0)]
        d, _ = self.decoder(torch.cat([first, given], 1), state)
        return self.pointer(keys, d).log_softmax(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def solve(self, P: Tensor, *, once: bool = False) -> Tensor:
        """The likeliest position at each step, n + 1 of them: [B, n + 1].

        Args:
            once: point at no element twice.
        """
        keys, elements, x, state = self.encode(P)
        rows, found = torch.arange(len(P), device=P.device), list[Tensor]()
        gone = P.new_zeros(keys.shape[:2], dtype=torch.bool)
        for _ in range(keys.shape[1]):
            d, state = self.decoder(x, state)
            found.append(self.pointer(keys, d)[:, 0].masked_fill(gone, -torch.inf).argmax(-1))
            x = elements[rows, found[-1]][:, None]
            gone[rows, found[-1]] = once & (found[-1] < P.shape[1])
        return torch.stack(found, 1)


def sorting(count: int, n: int) -> tuple[Tensor, Tensor]:
    """n numbers each in [0, 1], and their positions from the smallest on."""
    P = torch.rand(count, n, 1)
    return P, F.pad(P[..., 0].argsort(1), (0, 1), value=n)


def hull(count: int, n: int) -> tuple[Tensor, Tensor]:
    """n points each in the unit square, and the corners of their convex hull, counter-clockwise from the first of these
    in the input."""
    P = torch.rand(count, n, 2)
    x, y = (P[:, None] - P[:, :, None]).double().unbind(-1)  # from i to j, [B, i, j]
    left = x[..., None] * y[:, :, None] - y[..., None] * x[:, :, None] >= 0  # k, of i -> j: [B, i, j, k]
    follows = left.all(-1) & ~torch.eye(n, dtype=torch.bool)
    after, rows = follows.long().argmax(2), torch.arange(count)
    C = [follows.any(2).long().argmax(1)]
    for _ in range(n):
        now = after[rows, C[-1].clamp(min=0, max=n - 1)]
        ended = torch.where((C[-1] == n) | (C[-1] == IGNORE), IGNORE, n)
        C.append(torch.where((ended == n) & (now != C[0]), now, ended))
    return P, torch.stack(C, 1)


TASKS = {"sorting": sorting, "hull": hull}


def exact(net: PointerNet, task: str, n: int, count: int = 500) -> float:
    """The share of problems of n elements whose answer is right from its start to its end."""
    P, C = TASKS[task](count, n)
    return float(((net.solve(P, once=True) == C) | (C == IGNORE)).all(1).double().mean())


def experiment(config: PointerNetworkConfig) -> tuple[PointerNet, list[tuple[int, float]]]:
    """A trained network, and the share of exact answers by n, from 3 to the longest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PointerNet(1 if config.task == "sorting" else 2, config.width)
        for p in net.parameters():
            nn.init.uniform_(p, -0.2, 0.2)
        optimizer = torch.optim.Adam(net.parameters(), config.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
        for step in range(config.steps):
            P, C = TASKS[config.task](config.batch, config.lengths[step % len(config.lengths)])
            F.cross_entropy(net(P, C).flatten(0, 1), C.flatten()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return net, [(n, exact(net, config.task, n)) for n in range(3, config.longest + 1)]


# ---------------------------------------------------------------------------------------------------- a language model
Noted = tuple[Tensor, Tensor, Tensor]
"""Keys [B, N, size] and ids [B, N] of the tokens so far, -1 for pads and soft tokens; and how many of them each row of
the last norm sees, [B, T + P]."""


class Copy(nn.Module):
    """The pointer and the gate of a language model.

    Args:
        width: d. size: of v. gate: b.
    """

    def __init__(self, width: int, size: int, gate: float) -> None:
        super().__init__()
        self.pointer, self.gate = Pointer(width, size), nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, gate)
        self.noted: Noted | None = None
        """Between the last norm and the head."""

    def forward(self, noted: Noted, d: Tensor, logits: Tensor) -> Tensor:
        """log(p sum_w e^logits_w), [B, m, V]: with g = 1 the logits themselves.

        Args:
            d: [B, m, width], of the last rows. logits: [B, m, V].
        """
        (keys, ids, upto), V = noted, logits.shape[-1]
        seen = torch.arange(ids.shape[1], device=ids.device) < upto[:, -d.shape[1] :, None]  # [B, m, N]
        seen = (
            seen & ((ids >= 0) & (ids < V))[:, None]
        )  # of tokens that plugins add later there are no logits here
        u = self.pointer(keys, d).masked_fill(~seen, torch.finfo(keys.dtype).min)
        copied = torch.zeros_like(logits).scatter_add(
            2, ids.clamp(0, V - 1)[:, None].expand(u.shape), u.softmax(-1) * seen
        )
        gate, tiny = self.gate(d), torch.finfo(logits.dtype).tiny  # the logarithm of 0 has no gradient
        copied = copied.clamp(min=tiny).log() + logits.logsumexp(-1, keepdim=True)
        return torch.logaddexp(F.logsigmoid(gate) + logits, F.logsigmoid(-gate) + copied)


class Reads(Delta):
    """Notes the states of the tokens so far, at the last norm.

    Args:
        call: what the model is called on. owner: the plugin's id.
    """

    def __init__(self, call: Call, owner: str, copy: Copy) -> None:
        super().__init__()
        self.call, self.owner, self.copy = call, owner, (copy,)  # in a tuple: no child of this one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ids, real, (copy,) = self.call.ids, self.call.real, self.copy
        if real is None:  # no call of the model
            return y
        if ids is None:
            said = f"{self.owner}: what is copied are token ids, and the call brings embeddings"
            raise UnsupportedError(said, hint="model(input_ids=...)")
        own = self.call.rows(torch.ones_like(ids), y)  # 0 for soft tokens, [B, T + P]
        e = y[own.bool()].view(*ids.shape, -1).float()
        keys = self.call.carry(f"{self.owner} keys", copy.pointer.W1(e))
        known = self.call.carry(f"{self.owner} ids", torch.where(real, ids, -1), fill=-1)
        copy.noted = keys, known, known.shape[1] - ids.shape[1] + own.cumsum(1)
        return y


class Mixes(Delta):
    """The mixture in the place of the head's logits."""

    def __init__(self, copy: Copy) -> None:
        super().__init__()
        self.copy = (copy,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (copy,) = self.copy
        noted, copy.noted = copy.noted, None  # no module may hold on to a graph
        return y if noted is None else copy(noted, x.float(), y.float()).to(y.dtype)


class PointerNetwork(Plugin):
    """See the module."""

    Config = PointerNetworkConfig
    claims = {Claim.NEEDS_TOKENS, Claim.NEEDS_MASK}
    example = {"size": 8, "lengths": (3,), "longest": 4, "width": 8, "steps": 5}
    refuses = {
        "t5": "what it could copy stands in another tower",
        "bert": "it does not go on with a text",
        "mamba": "it keeps no cache of tokens",
        "vit": "it reads no tokens",
    }
    config: PointerNetworkConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        name, config = model.config.model_type, model.config.get_text_config()
        check_writes(model)
        for option in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, option, None) not in (None, 1.0):
                said = f"{model.owner}: {name} changes logits behind its head ({option}), and with them the mixture"
                raise ArchitectureError(said, hint="a decoder whose head gives the logits")
        model.attention_sites()  # refuses what keeps no cache of tokens
        copy = model.keep(
            "copy", Copy(model.hidden_size, self.config.size, self.config.gate), full_precision=True
        )
        model.site("norm.final").attach(Reads(model.call, model.owner, copy))
        model.site("head").attach(Mixes(copy))

    def check(self, stack: Stack) -> None:
        for member in stack.members:
            of_texts = member.claims(Claim.NO_LABELS) and member.claims(Claim.REPLACES_LOSS)
            if member.claims(Claim.CLASSIFIES) or of_texts:
                kind = "whole texts" if of_texts else "classes"
                said = f"{stack.id_of(self)} learns by logits of tokens, and the loss of '{member.id}' is of {kind}"
                raise ConflictError(said, hint="keep one of them")

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `exact/n-<n>`, the share of answers of the experiment's network that are right, for each n; by n it goes
        to `pointer-network.html` in the run's folder."""
        with torch.inference_mode(False), torch.enable_grad():
            _, shares = experiment(self.config)
        for n, share in shares:
            evaluation.add(f"exact/n-{n}", share, count=500)
        evaluation.figure("pointer-network", {self.config.task: shares}, x="n", y="share of exact answers")
