"""Robust prefix-tuning: a second prefix, tuned on a batch of texts, pulls their states to where clean ones lie.

"On Robust Prefix-Tuning for Text Classification" (arXiv:2203.10378). A frozen decoder names a text's class by the token
that it writes behind it. Keys and values P_theta of l rows stand before the text in every attention, and train on

    loss = - log p(first token of the class | x, P_theta)

The run ends with the manifolds. h_j(x) is the state behind layer j = 1..N at the text's last token, H_j [n, d] those of
the training texts that P_theta classifies right:

    H_j - mean = U S V^T,   Q_j = V_r V_r^T        r: the fewest leading columns with `mass` of the sum of S

In use each batch has a psi of its own: 0 at first, moved by a few steps of Adam, then forgotten. No label is read:

    loss(psi) = sum over j <= N of mean(((h_j - m_j) Q_j + m_j - h_j)^2)
                m_j: mean of h_j over the batch; of one text alone 0
    class = argmax of p(. | x, P_theta + psi)

h_j depends on the prefixes of the first N layers alone, so psi has rows there and nowhere else. Until manifolds are
known Q_j = I: loss and gradient are 0, and so is psi, which is plain prefix-tuning.

`evaluate` measures accuracy on clean and on attacked texts, with P_theta alone and with psi. The attacks are this
plugin's own: the substitution that costs the right class most, word by word, until P_theta errs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import (
    AttentionEdit,
    Claim,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import (
    ClassTexts,
    check_labels,
    continuation,
    following_ids,
    pads_right,
    take_classes,
)
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.anatomy.anatomy import Heads
from peftx.kernel.heads import last_of
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import objective_of
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation.classification import accuracy_of_head

LOOK_ALIKE = str.maketrans("aeiosl", "@310$1")


class RobustPrefixTuningConfig(PluginConfig):
    """Options of robust prefix-tuning; the release trains P_theta for 100 epochs at rate 5e-5, and tunes psi for 10
    steps at rates of 0.05 to 0.15."""

    labels: list[str] = Field(
        ["negative", "positive"], min_length=2, description="the classes, each by a first token of its own"
    )
    length: int = Field(10, ge=1, description="l, rows in front of each layer's keys and values")
    layers: int = Field(
        2, ge=1, description="N, layers whose states are pulled; the release's 3 counts the embeddings"
    )
    mass: float = Field(
        0.99, gt=0, le=1, description="share of the singular values' sum that a manifold keeps"
    )
    texts: int = Field(10_000, ge=2, description="most training texts read for the manifolds; paper: all")
    steps: int = Field(10, ge=0, description="steps that psi is tuned for each batch; 0: plain prefix-tuning")
    rate: float = Field(0.1, gt=0, description="of these steps")
    batch: int = Field(32, ge=1, description="texts to classify that share a psi")
    edits: int = Field(3, ge=1, description="most words of a text that an attack of `evaluate` changes")
    synonyms: dict[str, list[str]] = Field(
        {}, description="word in small letters -> words that an attack may put there; empty: no such attack"
    )


class Prefix(AttentionEdit):
    """K' = [theta_K + psi_K ; K], V' = [theta_V + psi_V ; V] in one attention.

    Args:
        heads: of the attention. length: l.
    """

    def __init__(self, heads: Heads, length: int) -> None:
        super().__init__()
        sizes = (heads.head_dim, heads.value_dim)
        self.theta = nn.ParameterList(torch.randn(heads.kv_heads, length, size) * 0.02 for size in sizes)
        self.psi: list[Tensor] = []

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        P = [theta + psi for theta, psi in zip(self.theta, self.psi, strict=True)] if self.psi else self.theta
        K, V = (rows.to(key).expand(len(key), -1, -1, -1) for rows in P)  # [B, heads, l, size]
        return torch.cat((K, key), 2), torch.cat((V, value), 2)


class Manifolds(nn.Module):
    """Q: [N, d, d]; I until they are known."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("Q", torch.eye(width).repeat(layers, 1, 1))

    def distance(self, h: Tensor) -> Tensor:
        """loss(psi), 0-d, of states [N, B, d]."""
        centred = h - h.mean(1, keepdim=True) * (h.shape[1] > 1)
        # Of Q = I exactly 0: Adam would make steps of its size out of rounding errors.
        return (centred - centred @ self.Q).square().mean((1, 2)).sum()


def projection(H: Tensor, mass: float) -> Tensor:
    """Q_j of states [n, d]."""
    _, S, Vt = torch.linalg.svd(H - H.mean(0), full_matrices=False)
    V_r = Vt[: int((S.cumsum(0) < mass * S.sum()).sum()) + 1]
    return V_r.T @ V_r


def misspelled(word: str) -> list[str]:
    """A word of four letters or more with its middle ones exchanged, without one, and in letters that look alike."""
    at = len(word) // 2
    exchanged = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    found = exchanged, word[:at] + word[at + 1 :], word.translate(LOOK_ALIKE)
    return [other for other in found if other != word] if len(word) > 3 else []


def attack(
    ask: Callable[[list[str]], Tensor], text: str, truth: int, others: Callable[[str], list[str]], edits: int
) -> str:
    """The text with at most `edits` words changed, each once, until `ask` finds another class than `truth`.

    Args:
        ask: scores of the classes, [N, C]. others: what may stand for a word.
    """
    pieces = re.split(r"(\w+)", text)  # every second one is a word
    free, scores = set(range(1, len(pieces), 2)), ask([text])
    while edits and int(scores[0].argmax()) == truth:
        tries = [(i, other) for i in sorted(free) for other in others(pieces[i])]
        if not tries:
            break
        scores = ask(["".join([*pieces[:i], other, *pieces[i + 1 :]]) for i, other in tries])
        worst = int(scores.log_softmax(-1)[:, truth].argmin())
        (i, pieces[i]), scores = tries[worst], scores[worst:]
        free, edits = free - {i}, edits - 1
    return "".join(pieces)


class RobustPrefixTuning(Plugin):
    """See the module."""

    Config = RobustPrefixTuningConfig
    example = {"length": 4, "steps": 2, "edits": 1}
    claims = {Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE}
    refuses = {
        "bert": "it writes no next token",
        "t5": "it writes nothing of what it reads",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
    }
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels_option = "labels"
    config: RobustPrefixTuningConfig
    texts = ClassTexts("robust-prefix-tuning", missing="there is no prefix yet")

    def suits(self, model: ModelView) -> None:
        kind = model.main.name, model.config.is_encoder_decoder, objective_of(model.module)
        if kind != ("decoder", False, "next-token"):
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} writes no class behind a text",
                hint="a decoder-only model with a head that writes: ...ForCausalLM",
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, sites = self.config, model.attention_sites()
        self.texts = self.texts.of(check_labels(config.labels))
        if not model.restoring:
            self.state = {"words": first_tokens(stack, config.labels)}
        edits = [Prefix(model.heads_of(site), config.length) for site in sites]
        for site, edit in zip(sites, edits, strict=True):
            site.attend(edit)
        below = [i for i, site in enumerate(sites) if site.layer in range(config.layers)]
        if config.layers > model.num_layers or not below:
            raise ArchitectureError(
                f"{model.owner}: {len(below)} attentions in the first {config.layers} of {model.num_layers} layers",
                hint="another number for `layers`",
            )
        self.first = [edits[i] for i in below]
        manifolds = Manifolds(config.layers, model.hidden_size)
        self.manifolds = model.keep("manifolds", manifolds, full_precision=True)
        model.shift_positions(config.length)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, target = take_classes(pads_right(step.batch))
        words = torch.tensor(self.state["words"], device=target.device)

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward()
            logits = last_of(outputs.logits, step.batch["attention_mask"]).float()
            return F.cross_entropy(logits, words[target]), outputs

        step.replace_task_loss(loss, over="rows")
        if step.last_micro and step.total is not None and step.index + 1 >= step.total:
            step.after_update(lambda _: self.learn(step.model, step.batches_of("train", self.config.texts)))
        return (yield)

    @torch.no_grad()
    def learn(self, model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> None:
        """Take the manifolds of rows with `class_index`. `stack.train` does it; a loop of your own has to."""
        found = []
        with eval_mode(model):
            for batch, target in (take_classes(pads_right(batch)) for batch in batches):
                h, scores = self.read(model, batch)
                found.append(h[:, scores.argmax(-1) == target])
        H = torch.cat(found, 1)  # [N, n, d]
        if (n := H.shape[1]) > 1:
            self.manifolds.Q.copy_(torch.stack([projection(h, self.config.mass) for h in H]))
        else:
            warnings.warn(
                f"robust-prefix-tuning: {n} training texts are classified right, and a manifold takes two, so psi "
                "will be 0: train longer",
                stacklevel=2,
            )

    def read(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """States [N, B, d] and scores of the classes [B, C], at the last token of each text."""
        outputs, mask = model(**batch, output_hidden_states=True, use_cache=False), batch["attention_mask"]
        states = outputs.hidden_states[1 : self.config.layers + 1]
        h = torch.stack([last_of(state, mask) for state in states]).to(self.manifolds.Q)
        return h, last_of(outputs.logits, mask)[:, self.state["words"]].float()

    def tune(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
        """Set psi, tuned on a batch; loss(psi) before each step."""
        losses = []
        for edit in self.first:
            edit.psi = [torch.zeros_like(x, dtype=torch.float32, requires_grad=True) for x in edit.theta]
        psi = [x for edit in self.first for x in edit.psi]
        optimizer = torch.optim.Adam(psi, lr=self.config.rate)
        for _ in range(self.config.steps):
            with torch.enable_grad():
                loss = self.manifolds.distance(self.read(model, batch)[0])
            for x, gradient in zip(psi, torch.autograd.grad(loss, psi), strict=True):
                x.grad = gradient
            optimizer.step()
            losses.append(loss.item())
        return losses

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        found = []
        # Tensors of inference mode take no part in gradients.
        with torch.inference_mode(False), torch.no_grad():
            for batch in self.texts.batches(stack, texts, size=self.config.batch):
                try:
                    self.tune(stack.model, batch)
                    found.append(self.read(stack.model, batch)[1])
                finally:
                    for edit in self.first:
                        edit.psi = []
        return self.texts.labels, torch.cat(found)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `accuracy/<texts>/prefix` and `accuracy/<texts>/robust` of texts that are `clean`, have `characters`
        substituted, or `words` (with `synonyms`). Attacks ask P_theta alone."""
        config, stack, rows = self.config, evaluation.stack, [*evaluation.rows("eval")]
        plain, names = copy(self), self.texts.labels
        plain.config = config.model_copy(update={"steps": 0})
        kinds: dict[str, Callable[[str], list[str]]] = {"clean": lambda word: [], "characters": misspelled}

        def ask(texts: list[str]) -> Tensor:
            return plain.classify(stack, texts)[1]

        if config.synonyms:
            kinds["words"] = lambda word: config.synonyms.get(word.lower(), [])
        for kind, others in kinds.items():
            if kind != "clean":
                rows = [
                    clean
                    | {"text": attack(ask, clean["text"], names.index(clean["label"]), others, config.edits)}
                    for clean in evaluation.rows("eval")
                ]
            for name, plugin in (("prefix", plain), ("robust", self)):
                score = accuracy_of_head(stack, plugin, rows).score
                evaluation.add_score(replace(score, name=f"accuracy/{kind}/{name}"))


def first_tokens(stack: Stack, labels: Sequence[str]) -> list[int]:
    """Of each label as it follows a text; a space that is a token of its own is none.

    Raises:
        DataError: two labels begin with one token.
    """
    rows = [following_ids(stack.tokenizer, continuation("?", label)) for label in labels]
    found = [next(id for id in ids if stack.tokenizer.decode([id]).strip()) for ids in rows]
    if len({*found}) < len(found):
        raise DataError(
            f"robust-prefix-tuning: the first tokens of {', '.join(labels)} are {found}, and two classes have one",
            hint="other words in `labels`",
        )
    return found
