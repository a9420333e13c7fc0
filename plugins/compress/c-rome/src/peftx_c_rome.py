"""C-ROME: facts are written into one MLP by updates of rank one, whose key is the same wherever it stands.

"Understanding the Collapse of LLMs in Model Editing" (arXiv:2406.11263), which mends ROME (arXiv:2202.05262). W is the
down projection of an MLP, k what enters it at the last token of a fact's subject s, x_j are short texts and p is a
prompt with s in it. With C = E[k k^T] over the tokens of calibration text,

    k_bar = mean over j of k(x_j + p)
    d = argmin mean over j of -log P(o | x_j + p; d) + a KL(P(. | "s is a"; d) || P(. | "s is a")) + b |d| / |v|^2
    v* = W k_bar + d;   W' = W + (v* - W k_bar) (C^-1 k_bar)^T / (k_bar^T C^-1 k_bar)

where (.; d) adds d to what W gives at the last token of s, v = W k_bar, o is the fact's new object; so W' k_bar = v*.
The code of ROME (`keys: mixed`) has k_u = k(p), without x_j, in two of three places:

    W' = W + (v* - W k_u) (C^-1 k_bar)^T / (k_u^T C^-1 k_bar)

A first token's k is far from all others. Where s is the first token, this denominator comes near 0, and one edit breaks
the model; k_bar^T C^-1 k_bar is positive. The new object then follows x_j + p, so a prompt that begins with s wants a
prefix when it is used, too (`CRome.prompt`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from peftx import BoundSite, Claim, Delta, Evaluation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.engines.data import IGNORE, Collator, continuation, following_ids, prompt_ids
from peftx.errors import ArchitectureError, OptionError
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import DeltaPart
from peftx.toolkits.compression import Calibration
from peftx.toolkits.injecting import lent

Edit = tuple[str, str, str]  # prompt, subject, object
STARTS = ("The", "Therefore", "Because", "I", "You")


def _one_place(edit: Edit) -> Edit:
    prompt, subject, target = edit
    if prompt.count("{}") != 1 or not subject.strip() or not target.strip():
        raise ValueError("a fact is [prompt with one {} for the subject, subject, new object], none empty")
    return edit


class CRomeConfig(PluginConfig):
    """Options of C-ROME; defaults are those of GPT-J. Llama-2-7B has 25 steps and a decay of 0.001."""

    edits: tuple[Annotated[Edit, AfterValidator(_one_place)], ...] = Field(
        (),
        description="facts, one after another: [prompt with {} for the subject, subject, object]",
    )
    layer: int | None = Field(
        None, ge=0, description="whose MLP is edited; 5 of 28 if left out (GPT-2 XL: 17)"
    )
    keys: Literal["uniform", "mixed"] = Field(
        "uniform", description="k_bar everywhere; or, as in the code of ROME, k_u in two places"
    )
    prefixes: tuple[str, ...] = Field(
        (), description="x_j, texts without a full stop at their end; 20 that the model writes if left out"
    )
    steps: int = Field(20, ge=1, description="of Adam, for d")
    learning_rate: float = Field(0.5, gt=0, description="of Adam")
    kl: float = Field(0.0625, ge=0, description="a, weight of what the subject is to stay")
    decay: float = Field(0.5, ge=0, description="b")
    largest: float = Field(4.0, gt=0, description="d is cut back to so many times the length of v")
    enough: float = Field(0.05, ge=0, description="loss below which the steps end")
    moments: bool = Field(True, description="C of the calibration text; else the unit matrix")
    damping: float = Field(
        1e-2, gt=0, description="added to the diagonal of C, as a share of the mean of its diagonal"
    )
    collapse: float = Field(
        2.0, gt=1, description="factor in the perplexity of the calibration text that is warned of"
    )


class RankOnes(Delta):
    """y + L R^T x: float32 L [out, n], R [in, n], one column an edit. `probe(x, y)` sees and edits what W gives."""

    full_precision = True
    probe: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, shape: Sequence[int], edits: int) -> None:
        super().__init__()
        for name, size in zip("LR", shape, strict=True):
            self.register_buffer(name, torch.zeros(size, edits))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y + (x.to(self.R.dtype) @ self.R @ self.L.t()).to(y.dtype)
        return y if self.probe is None else self.probe(x, y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.L @ self.R.t()).to(weight.dtype), bias


class Texts:
    """Texts x_j + p + o with one subject.

    Args:
        rows: (x_j, p, o) of each, "" for what it has not.

    Attributes:
        batch: of the model, padded on the right; its labels are o. ends: [B], how far from the end of its row, pads
            counted, the subject's last token is.
    """

    def __init__(self, stack: Stack, subject: str, rows: Sequence[tuple[str, str, str]]) -> None:
        found, places = [], []
        for front, prompt, target in rows:
            before, _, after = (f"{front}. {prompt}" if front else prompt).partition("{}")
            head = prompt_ids(
                stack.tokenizer, before + subject
            )  # apart, so that it ends where the subject does
            places.append(len(head) - 1)
            head += following_ids(stack.tokenizer, after) if after else []
            text = continuation(before + subject + after, target)
            tail = following_ids(stack.tokenizer, text) if target else []
            found.append({"input_ids": head + tail, "labels": [IGNORE] * len(head) + tail})
        batch = Collator(stack.tokenizer.pad_token_id or 0)(found)
        self.batch = {name: values.to(stack.model.device) for name, values in batch.items()}
        self.ends = self.batch["labels"].shape[1] - torch.tensor(places, device=stack.model.device)

    def at(self, rows: Tensor) -> Tensor:
        """Where the subjects' last tokens are in [B T', f] of a layer; soft tokens stand in front of a text."""
        count = len(self.ends)
        return (torch.arange(count, device=rows.device) + 1) * (len(rows) // count) - self.ends


class CRome(Plugin):
    """See the module."""

    Config = CRomeConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_CALIBRATION}
    refuses = {
        "bert": "it does not go on with a text",
        "t5": "a subject is read in one tower, and its object written in the other",
    }
    example = {"edits": [["{} lives in", "Ann", "Rome"]], "steps": 2, "prefixes": ["A letter", "The road"]}
    config: CRomeConfig

    def suits(self, model: ModelView) -> None:
        if not model.anatomy.is_decoder or len(model.towers) > 1:
            said = f"{model.owner}: {model.config.model_type} is no decoder of texts"
            raise ArchitectureError(said, hint="llama, gpt2, qwen3, opt, ...")
        self.site(model)

    def site(self, model: ModelView) -> BoundSite:
        """W."""
        layer = model.num_layers * 5 // 28 if self.config.layer is None else self.config.layer
        found = [s for s in model.linears("all", whole=True) if (s.role, s.layer) == ("mlp.down", layer)]
        if len(found) != 1:
            said = (
                f"{model.owner}: {model.config.model_type} has {len(found)} down projections in layer {layer}"
            )
            raise ArchitectureError(said, hint=f"a layer below {model.num_layers} that has one MLP")
        return found[0]

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if not self.config.edits:
            raise OptionError(f"{model.owner}: no edits", hint='edits=[["{} lives in", "Ann", "Rome"]]')
        standing, site = stack.ledger.of(model.owner, DeltaPart), self.site(model)
        new = RankOnes(site.shape, len(self.config.edits))
        self.delta = standing[0].module if standing else site.attach(new)  # compressed before it was injected

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration, stack: Stack) -> None:
        self.inject(model, stack)
        try:
            self.edit(stack, calibration)
        except BaseException:  # Ctrl-C too
            self.delta.L.zero_()
            raise

    def edit(self, stack: Stack, calibration: Calibration) -> None:
        """All edits, each on the model with those before it."""
        C, fronts = self.second_moment(stack, calibration), list(self.config.prefixes) or written(stack)
        seen = [perplexity(stack, calibration.batches)]
        self.state |= {"prefixes": fronts, "edits": [], "perplexity": seen}
        for n, (prompt, subject, target) in enumerate(self.config.edits):
            texts = [(front, prompt, target) for front in fronts]
            k, v = self.read(stack, subject, texts)
            key = torch.linalg.solve(C, k)
            if self.config.keys == "mixed":
                k, v = self.read(stack, subject, [("", prompt, "")])
            d, loss = self.change(stack, Texts(stack, subject, [*texts, ("", "{} is a", "")]), v.norm())
            self.delta.L[:, n], self.delta.R[:, n] = d, key / (key @ k)
            norms = {"d": d.norm(), "dW": d.norm() * (key / (key @ k)).norm()}
            told = {**norms, "denominator": key @ k, "loss": loss}
            self.state["edits"].append({name: float(value) for name, value in told.items()})
            seen.append(perplexity(stack, calibration.batches))
            if not seen[-1] < self.config.collapse * seen[0]:
                said = f"{stack.id_of(self)}: the edit of '{subject}' took the perplexity of the calibration text to"
                way = "keys: uniform, a smaller `largest`, fewer edits or another layer"
                warnings.warn(f"{said} {seen[-1]:.3g}, from {seen[0]:.3g} before all; {way}", stacklevel=2)

    def run(
        self, stack: Stack, batch: dict[str, Tensor], edit: Callable[[Tensor], Tensor] = lambda y: y
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and what W gets and gives [B T', .], which `edit` changes."""
        seen: list[Tensor] = []

        def probe(x: Tensor, y: Tensor) -> Tensor:
            seen[:] = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            return edit(seen[1]).view_as(y)

        with lent([self.delta], "probe", [probe]):
            logits: Tensor = stack.model(**batch, use_cache=False).logits
        return logits, *seen

    def second_moment(self, stack: Stack, calibration: Calibration) -> Tensor:
        """C, [in, in] float64."""
        unit = torch.eye(len(self.delta.R), dtype=torch.float64, device=self.delta.R.device)
        if not self.config.moments:
            return unit
        C = torch.zeros_like(unit)
        for batch in calibration.batches:
            _, k, _ = self.run(stack, batch)
            C += k.double().t() @ k.double() / calibration.tokens
        return C + self.config.damping * C.diagonal().mean() * unit

    def read(self, stack: Stack, subject: str, rows: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
        """k [in] and W k [out] of the subject, float64: means over the texts."""
        texts = Texts(stack, subject, rows)
        _, x, y = self.run(stack, texts.batch)
        return x[texts.at(x)].double().mean(0), y[texts.at(y)].double().mean(0)

    def change(self, stack: Stack, texts: Texts, length: Tensor) -> tuple[Tensor, Tensor]:
        """d [out] and the last loss; the last of the texts is "s is a", the length is that of v."""
        d, config, first = torch.zeros_like(self.delta.L[:, 0]).requires_grad_(), self.config, None
        target, last = texts.batch["labels"][:-1, 1:], int(texts.batch["attention_mask"][-1].sum()) - 1

        def add(rows: Tensor) -> Tensor:
            return rows.index_add(0, texts.at(rows), d.to(rows.dtype).expand(len(texts.ends), -1))

        optimizer = torch.optim.Adam([d], config.learning_rate)
        for _ in range(config.steps):
            with torch.enable_grad():
                logs = self.run(stack, texts.batch, add)[0].float().log_softmax(-1)
                now, first = logs[-1, last], logs[-1, last].detach() if first is None else first
                loss = F.nll_loss(logs[:-1, :-1].flatten(0, 1), target.flatten(), ignore_index=IGNORE)
                loss = loss + config.kl * F.kl_div(first, now, reduction="sum", log_target=True)
                loss = loss + config.decay * d.norm() / length.to(d) ** 2
            if loss < config.enough:
                break
            (d.grad,) = torch.autograd.grad(loss, d)
            optimizer.step()
            d.mul_((config.largest * length.to(d) / d.norm()).clamp_max(1))
        return d.detach(), loss.detach()

    def prompt(self, text: str) -> str:
        """The text, behind a prefix if it begins with a subject that was edited: a first token has another k."""
        begins = any(text.startswith(subject) for _, subject, _ in self.config.edits)
        return f"{self.state['prefixes'][0]}. {text}" if begins and self.state else text

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Share of the edits whose object is written, behind a prefix and without; how often the perplexity of before
        all is in that of after; the largest norm of dW. 0 before there are any."""
        edits = self.config.edits if self.state else ()
        for name, front in (("efficacy", self.state.get("prefixes", [""])[0]), ("efficacy_alone", "")):
            said = [says(evaluation.stack, subject, (front, p, o)) for p, subject, o in edits]
            evaluation.add(name, sum(said) / max(len(said), 1), count=len(said))
        seen, sizes = self.state.get("perplexity", []), [edit["dW"] for edit in self.state.get("edits", [])]
        evaluation.add("perplexity_ratio", seen[-1] / seen[0] if seen else 0.0)
        evaluation.add("largest_change", max(sizes, default=0.0))


def written(stack: Stack) -> list[str]:
    """Prefixes x_j: 20 texts of at most 5 and 10 tokens that the model writes."""
    starts = list(STARTS * 2)
    found = [stack.generate(starts, max_new_tokens=n, do_sample=True, seed=stack.seed + n) for n in (4, 9)]
    return [start + text for texts in found for start, text in zip(starts, texts, strict=True)]


@torch.no_grad()
def perplexity(stack: Stack, batches: list[dict[str, Tensor]]) -> float:
    """Of all sequences [1, T] together."""
    with eval_mode(stack.model):
        logits = torch.cat([stack.model(**batch).logits[0, :-1].float() for batch in batches])
    return float(F.cross_entropy(logits, torch.cat([batch["input_ids"][0, 1:] for batch in batches])).exp())


@torch.no_grad()
def says(stack: Stack, subject: str, row: tuple[str, str, str]) -> bool:
    """Is every token of the object the likeliest one."""
    batch = Texts(stack, subject, [row]).batch
    with eval_mode(stack.model):
        best, target = stack.model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    return bool(((best == target) | (target == IGNORE)).all())
