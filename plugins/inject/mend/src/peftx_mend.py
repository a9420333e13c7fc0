"""MEND: small networks learn to turn the gradient of one fact into an edit that holds, and hurts nothing else.

"Fast Model Editing at Scale" (arXiv:2110.11309). In a layer W [out, in] the gradient of -log p(y_e | x_e) is a sum
over tokens of d u^T, where u [in] is what enters the layer and d [out] the gradient at what it gives. An editor g, one
for all matrices of a shape, rewrites these vectors; u and d are constants, and only g and alpha, one number a matrix,
train:

    z = ([u; d] - mean) / std                      running statistics of the tokens that g was trained on
    h = z + max(s_1 * (U_1 V_1 z + b_1) + t_1, 0)  s, t: of each matrix; U starts at 0, so g at the identity
    [u~; d~] = h + max(s_2 * (U_2 V_2 h + b_2) + t_2, 0)
    W~ = W - alpha * sum of d~ u~^T                over tokens, and over the facts of a batch
    loss = c_e * -log p_W~(y_e | x_e') + c_loc * KL(p_W(. | x_loc) || p_W~(. | x_loc))

with x_e' another way to ask x_e, and x_loc a text that has nothing to do with it. Then any fact is written by one
backward pass, as two vectors a token beside W.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import (
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    Targets,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import IGNORE, Collator, Place, pair_of, tokenize_dataset
from peftx.errors import ArchitectureError, DataError, StackError
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import pad_of
from peftx.kernel.reading import check_output
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation import context_window
from peftx.toolkits.injecting import lent

REPHRASED = ("rephrased_ids", "rephrased_labels")
"""Columns of x_e' y_e, where the rows have a text `rephrase`."""
TOGETHER = 16
"""Rows in a forward pass that measures."""


def _whole(edit: tuple[str, str]) -> tuple[str, str]:
    if not all(text.strip() for text in edit):
        raise ValueError("an edit is [prompt, answer], none empty")
    return edit


def _of_one_mind(edits: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    said: dict[str, str] = {}
    for prompt, answer in edits:
        if (other := said.setdefault(prompt, answer)) != answer:
            raise ValueError(f"{prompt!r} has the answers {other!r} and {answer!r}, and one edit writes both")
    return edits


Fact = Annotated[tuple[str, str], AfterValidator(_whole)]
Facts = Annotated[tuple[Fact, ...], AfterValidator(_of_one_mind)]


class MendConfig(PluginConfig):
    """Options of MEND; the paper trains with Adam at 1e-6, ten edits a step."""

    edits: Facts = Field(
        (), description="facts that are written when the stack is compressed: [prompt, answer]"
    )
    targets: Targets = Field(Targets("mlp layers=-3--1"), description="W, matrices that are edited")
    rank: int = Field(1920, ge=1, description="of U V at most; the width of [u; d] where that is less")
    edit_weight: float = Field(0.1, gt=0, allow_inf_nan=False, description="c_e")
    locality_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="c_loc")
    scale: float = Field(1e-4, gt=0, allow_inf_nan=False, description="alpha at the start")
    scale_rate: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="rate of alpha over that of the editors, under Adam"
    )


class Residual(nn.Module):
    """h + max(s * (U V h + b) + t, 0), with s and t of the matrix.

    Args:
        width: of h. matrices: how many share it. rank: of U V.
    """

    def __init__(self, width: int, matrices: int, rank: int) -> None:
        super().__init__()
        self.U, self.V = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.randn(rank, width))
        self.b = nn.Parameter(torch.zeros(width))
        self.s, self.t = (nn.Parameter(start(matrices, width)) for start in (torch.ones, torch.zeros))

    def forward(self, h: Tensor, m: int) -> Tensor:
        change = self.s[m] * (h @ self.V.t() @ self.U.t() + self.b) + self.t[m]
        return h + change.clamp(min=0)  # not relu: its gradient at 0 is 0, and U would never start


class Editor(nn.Module):
    """g and alpha of all matrices of a shape. Rows [u; d] are [N, in + out]; alpha is `ratio * a`, [matrices].

    Args:
        out, into: of the matrices. matrices: how many share it. config: ranks, alpha.
    """

    def __init__(self, out: int, into: int, matrices: int, config: MendConfig) -> None:
        super().__init__()
        width, self.sizes, self.ratio = into + out, (into, out), config.scale_rate
        self.layers = nn.ModuleList(Residual(width, matrices, min(config.rank, width)) for _ in range(2))
        self.a = nn.Parameter(torch.full((matrices,), config.scale / config.scale_rate))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))  # sum of squared distances from the mean

    def learn(self, z: Tensor) -> None:
        """Take rows into the statistics."""
        if not len(z):  # the model was certain, and nothing has a gradient
            return
        total, distance = self.count + len(z), z.mean(0) - self.mean
        self.squares += z.var(0, correction=0) * len(z) + distance.square() * self.count * len(z) / total
        self.mean += distance * len(z) / total
        self.count.copy_(total)

    def normalised(self, z: Tensor) -> Tensor:
        """By the statistics, if there are any; a number that never varied tells nothing, and becomes 0."""
        if self.count == 0:
            return z
        std = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return torch.where(std > 0, (z - self.mean) / (std + 1e-7), 0.0)

    def forward(self, z: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Of the tokens in matrix m: -alpha d~ [out, N] and u~ [in, N]."""
        z = self.normalised(z)
        for layer in self.layers:
            z = layer(z, m)
        u, d = z.split(self.sizes, -1)
        return -self.ratio * self.a[m] * d.t(), u.t()


class Edit(Delta):
    """y + L R^T x: float32 L [out, n], R [in, n], one column a token; those of a `draft` (L, R) too.

    A `tape` that is a list gets x, and zeros that are added to y, so that their gradient is d.
    """

    full_precision = True
    draft: tuple[Tensor, Tensor] | None = None
    tape: list[Tensor] | None = None

    def __init__(self, out: int, into: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("L", torch.zeros(out, columns))
        self.register_buffer("R", torch.zeros(into, columns))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for L, R in ((self.L, self.R), *([self.draft] if self.draft else [])):
            y = y + (x.to(R.dtype) @ R @ L.t()).to(y.dtype)
        if self.tape is None:
            return y
        self.tape[:] = x.detach(), torch.zeros_like(y, requires_grad=True)
        return y + self.tape[1]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.L @ self.R.t()).to(weight.dtype), bias


Rows = list[Tensor]
"""[u; d] of the tokens, float32 [N, in + out], of each matrix."""


class Mend(Plugin):
    """See the module."""

    Config = MendConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS, Claim.NEEDS_LABELS, Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
    }  # fmt: skip
    takes = ("prompt-completion",)
    sources = {
        "unrelated": ({"prompt": "Ann is in", "completion": "Rome"}, {"prompt": "2 + 2", "completion": "4"})
    }
    example = {"edits": [["Who wrote it?", "Ann"]], "targets": "mlp layers=-1", "rank": 8}
    refuses = {"bert": "it answers no prompts", "vit": "it answers no prompts", "mamba": "it has no MLP"}
    exempt = {"accumulation_makes_the_same_step": "facts of a batch are one edit, and alone each is its own"}
    config: MendConfig
    deltas: Sequence[Edit] = ()

    @hookimpl
    def inject(self, model: ModelView) -> None:
        kind, reads, config = model.config.model_type, model.module.main_input_name, self.config
        if reads != "input_ids" or not {"decoder"} <= {*model.towers} <= {"decoder", "encoder"}:
            raise ArchitectureError(
                f"{model.owner}: {kind} answers no prompts of text alone", hint="a decoder"
            )
        for name in REPHRASED:
            model.column(name, own_length=True)
        sites = model.linears(config.targets, whole=True)
        shapes = [(site.out_features, site.in_features) for site in sites]
        columns = self.state.setdefault("columns", [0] * len(sites))
        for site in sites:
            check_output(site, owner=model.owner)
        self.deltas = [s.attach(Edit(*shape, n)) for s, shape, n in zip(sites, shapes, columns, strict=True)]
        editors = {shape: Editor(*shape, shapes.count(shape), config) for shape in shapes}
        for (out, into), editor in editors.items():
            model.keep(f"{out}x{into}", editor, full_precision=True)
        self.editors = [(editors[shape], shapes[:i].count(shape)) for i, shape in enumerate(shapes)]

    # -- the edit ------------------------------------------------------------------------------------------------

    def gradients(self, stack: Stack, batch: dict[str, Tensor]) -> Rows:
        """u and d of the facts of a batch, which add up; a token with nothing in either is left out.

        Raises:
            PeftxError: a layer that is to be edited did not run with its delta.
        """
        model = stack.model
        tapes: list[list[Tensor]] = [[] for _ in self.deltas]
        with lent(self.deltas, "tape", tapes), eval_mode(model), torch.enable_grad():
            loss = nll(model, model(**batch).logits, batch["labels"]).sum()
        if silent := tapes.count([]):
            said = f"{stack.id_of(self)}: {silent} layers that it is to edit are merged or switched off"
            raise StackError(said, hint="stack.unmerge(), or write before the merge")
        # The graph is kept for plugins that read what the model gave here (DEFT), and goes with the last who holds it.
        ds, found = torch.autograd.grad(loss, [zeros for _, zeros in tapes], retain_graph=True), []
        for (x, _), gradient in zip(tapes, ds, strict=True):
            u, d = (rows.flatten(0, -2).float() for rows in (x, gradient))
            found.append(torch.cat((u, d), -1)[(u != 0).any(-1) & (d != 0).any(-1)])
        return found

    def updates(self, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """L and R of each matrix."""
        return [editor(z, m) for (editor, m), z in zip(self.editors, rows, strict=True)]

    # -- training ------------------------------------------------------------------------------------------------

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        if data.train is not None and "rephrase" in data.train.column_names:
            pairs = zip(data.train["rephrase"], data.train["completion"], strict=True)
            rows = tokens(stack, list(pairs), data.max_length)
            for name, of in zip(REPHRASED, ("input_ids", "labels"), strict=True):
                data.train = data.train.add_column(name, rows[of][:])

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        """The term `locality` is the KL divergence."""
        model, facts = step.model, {n: x for n, x in step.batch.items() if n not in REPHRASED}
        step.batch, other = self.rephrased(step, facts), step.batch_of("unrelated")
        rows = self.gradients(step.stack, facts)
        for (editor, _), z in zip(self.editors, rows, strict=True):
            editor.learn(z)
        with eval_mode(model), torch.no_grad():
            before = model(**other).logits
        told = other["labels"] != IGNORE if model.config.is_encoder_decoder else other["attention_mask"] != 0

        def edit() -> tuple[Tensor, Any]:
            with lent(self.deltas, "draft", self.updates(rows)), eval_mode(model):
                outputs = step.forward()
            L_e = nll(model, outputs.logits, step.batch["labels"]).mean()
            return self.config.edit_weight * L_e, outputs

        def locality(_: Any) -> Tensor:
            with lent(self.deltas, "draft", self.updates(rows)), eval_mode(model):
                return divergence(before[told], model(**other).logits[told])

        step.replace_task_loss(edit, over="rows")
        step.add_loss("locality", locality, self.config.locality_weight, over="step")
        return (yield)

    def rephrased(self, step: TrainStep, facts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of x_e' y_e; of x_e y_e where the rows have no other way to ask."""
        if REPHRASED[0] not in step.batch:
            return facts
        ids, labels = (step.batch[name] for name in REPHRASED)
        pad = pad_of(step.model, step.stack.tokenizer)
        new = {"input_ids": ids.masked_fill(ids < 0, pad), "attention_mask": (ids >= 0).long()}
        return facts | new | {"labels": labels.masked_fill(labels < 0, IGNORE)}

    # -- use -----------------------------------------------------------------------------------------------------

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        if not (self.deltas and self.config.edits):
            missing = "edits" if self.deltas else "editors yet, before `inject`"
            hint = 'edits=[["Who wrote it?", "Ann"]], and `phase: after-training` in a spec'
            raise StackError(f"{model.owner}: there are no {missing}", hint=hint)
        self.write(stack, self.config.edits)

    @torch.no_grad()
    def write(self, stack: Stack, edits: Sequence[tuple[str, str]]) -> None:
        """Write facts, [prompt, answer], into the model as it is now, together; a bundle holds them from then on.

        Raises:
            PluginError: what the option `edits` refuses.
        """
        edits = Mend(edits=edits).config.edits
        updates = self.updates(self.gradients(stack, batch_of(stack, edits)))
        for delta, (L, R) in zip(self.deltas, updates, strict=True):
            delta.L, delta.R = torch.cat((delta.L, L), 1), torch.cat((delta.R, R), 1)
        self.state["columns"] = [delta.L.shape[1] for delta in self.deltas]
        self.state["edits"] = [*self.state.get("edits", []), *map(list, edits)]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `largest_change`, the largest norm of W~ - W, and once facts are written

        `reliability`, the share of them whose answer's tokens are all the likeliest ones,
        `generality`, the same share of the rows `eval` that ask for one by `rephrase`, and
        `locality`, the share of all other rows whose likeliest tokens are those that they were without the edits.

        What no row is about is left out. Of a prompt that was written twice the last answer counts.

        Raises:
            DataError: a row without an answer. MergeError: `locality`, of edits that are merged.
        """
        stack, edits = evaluation.stack, dict(self.state.get("edits", []))
        given = evaluation.data.get("eval", ()) if edits else ()
        if silent := [i for i, row in enumerate(given) if isinstance(row, str) or not pair_of(row)[1]]:
            said = f"{Place(given, silent[0])} has no answer"
            raise DataError(f"{stack.id_of(self)}: {said}", hint="rows of prompt and completion")
        rows = [(row, *pair_of(row)) for row in given]
        again = [(row["rephrase"], edits[x]) for row, x, _ in rows if x in edits and row.get("rephrase")]
        others = [(x, y) for _, x, y in rows if x not in edits]
        for name, facts in (("reliability", [*edits.items()]), ("generality", again)):
            if facts:
                right = sum(torch.equal(best, y) for best, y in likeliest(stack, facts))
                evaluation.add_share(name, right, len(facts))
        if others:
            after = likeliest(stack, others)
            with stack.disabled(stack.id_of(self)):
                before = likeliest(stack, others)
            same = sum(torch.equal(a, b) for (a, _), (b, _) in zip(after, before, strict=True))
            evaluation.add_share("locality", same, len(others))
        evaluation.add("largest_change", max(float((delta.L @ delta.R.t()).norm()) for delta in self.deltas))


def tokens(stack: Stack, pairs: Sequence[Sequence[str]], max_length: int) -> Dataset:
    """Prompts and their answers as the model reads them."""
    rows = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    return tokenize_dataset(
        rows, stack.tokenizer, format="prompt-completion", max_length=max_length,
        encoder_decoder=stack.model.config.is_encoder_decoder,
    )  # fmt: skip


def batch_of(stack: Stack, pairs: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """The same as a batch of the model."""
    model, tokenizer = stack.model, stack.tokenizer
    collate = Collator(pad_of(model, tokenizer), encoder_decoder=model.config.is_encoder_decoder)
    rows = tokens(stack, pairs, context_window(model, tokenizer))
    return {name: x.to(model.device) for name, x in collate(list(rows)).items()}


def answers(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the labels that they are of: those of the next token in a decoder."""
    return (logits, labels) if model.config.is_encoder_decoder else (logits[:, :-1], labels[:, 1:])


def nll(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(y | x), the mean over the tokens of y, of each row [B]."""
    logits, labels = answers(model, logits, labels)
    each = F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORE, reduction="none")  # [B, T]
    return each.sum(1) / (labels != IGNORE).sum(1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits [N, V], the mean over rows."""
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@torch.no_grad()
def likeliest(stack: Stack, pairs: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
    """Of each prompt and answer, the likeliest token in the place of each of the answer's, and these, [n] both."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(pairs), TOGETHER):
        batch = batch_of(stack, pairs[start : start + TOGETHER])
        with eval_mode(stack.model):
            logits, labels = answers(stack.model, stack.model(**batch).logits, batch["labels"])
        told = zip(logits.argmax(-1), labels, labels != IGNORE, strict=True)
        found += [(best[own], y[own]) for best, y, own in told]
    return found
