"""SelectIT: a model rates instruction pairs from 1 to K, and how sure it is of its ratings says which pairs are good.

"SelectIT: Selective Instruction Tuning for Large Language Models via Uncertainty-Aware Self-Reflection"
(arXiv:2402.16705). A rating prompt asks for a digit; P_k is the probability of the token of k = 1..K behind it.

    q_k     = P_k / sum_j P_j
    S       = argmax_k q_k
    S_tok   = S / (K - 1) sum_k |q_S - q_k|                 token level: 0 where all digits are alike, K at most
    S_sent  = mean S_tok / (1 + alpha std S_tok)            sentence level: over rating prompts of other wordings
    S_final = sum_i theta_i S_sent^i / sum_i theta_i        model level: over raters i of theta_i parameters

The floor(share N) pairs with the largest S_final are kept, in their order. A rating is one forward pass, and no
text is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from peftx import ModelView, Plugin, PluginConfig, Stack, TrainingData, Worker, hookimpl
from peftx.engines.data import Lazy, following_ids, pairs_of, prompt_ids, with_column
from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.stack import Stack as Kernel
from peftx.toolkits.evaluation import Request, context_window, score_requests
from peftx.toolkits.working import OfStack, kept_file

SELF = "self"
END = "\n\nThe answer is:\n"
RATINGS = (
    "Rate from 1 to {k} how well the response does what the instruction asks; {k} is best. Give only the number.",
    "How accurate is the response below? Give a whole number from 1 (not at all) to {k} (fully), no other word.",
    "Read the instruction and the response, and judge the response: 1 is useless, {k} is perfect. Write one digit.",
    "You grade answers. The grade of the answer below is a number from 1, the worst, to {k}, the best. State it alone.",
    "On a scale of 1 to {k}, does the response follow the instruction, and is it correct? Reply with the score.",
)


class SelectItConfig(PluginConfig):
    """Options of SelectIT; the paper keeps 20% of Alpaca-GPT4, rated by LLaMA-2 of 7, 13 and 70 billion parameters."""

    share: float = Field(0.2, gt=0, le=1, description="of the rows that are kept")
    raters: tuple[str, ...] = Field(
        (SELF,), min_length=1, description="models that rate: self, a folder, a hub id, or peftx:tiny"
    )
    scale: int = Field(5, ge=2, le=9, description="K, the best rating")
    prompts: tuple[str, ...] = Field(
        (), description="rating prompts, {k} in them is the scale; five of our own unless given"
    )
    alpha: float = Field(
        0.2, ge=0, allow_inf_nan=False, description="weight of the spread over rating prompts"
    )
    batch_size: int = Field(8, ge=1, description="ratings in one forward pass")
    scores: Path | None = Field(
        None, description="file that keeps ratings with what was rated, in the place of peftx's own"
    )

    @field_validator("raters", "prompts")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"'{twice}' stands twice")
        return values


class SelectIt(Plugin):
    """See the module. Rows have a column more, `selectit`: S_final, None where there was nothing to rate."""

    Config = SelectItConfig
    takes = ("prompt-completion", "messages")
    example = {"raters": ("peftx:tiny",), "share": 0.5}
    config: SelectItConfig

    def suits(self, model: ModelView) -> None:
        if SELF in self.config.raters:
            _refuse(model.owner, model.module)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Keep `share` of the rows. The others go as `no answer` or `rated below those kept`.

        Raises:
            UnsupportedError: rows of another format, or a rater whose digits are not one token each.
            DataError: a share of less than a row, pairs that are all alike, a rater that cannot read a rating prompt.
        """
        config, id = self.config, stack.id_of(self)
        data.require(self.takes, by=id)
        if not data.train:  # the core says so
            return
        pairs = pairs_of(data.train)
        count, answered = floor(config.share * len(pairs)), [i for i, (_, y) in enumerate(pairs) if y.strip()]
        if count == 0:
            raise DataError(
                f"{id}: share {config.share:g} of {len(pairs)} rows is less than one",
                hint=f"share at least {ceil(1000 / len(pairs)) / 1000:g}",
            )
        if len(answered) > count and all(pairs[i] == pairs[answered[0]] for i in answered):
            raise DataError(
                f"{id}: all {len(answered)} pairs are the same text, so none is better than another",
                hint="are these the right columns?",
            )
        rated = Lazy(len(answered), lambda n: pairs[answered[n]])
        S = self._rate(rated, data, stack, id) if answered else []
        scores = dict(zip(answered, S, strict=True))
        kept = best(scores, pairs)[:count]
        reasons: list[str | None] = ["no answer"] * len(pairs)
        for i in answered:
            reasons[i] = "rated below those kept"
        for i in kept:
            reasons[i] = None
        data.train = with_column(data.train, "selectit", [scores.get(i) for i in range(len(pairs))])
        data.keep(reasons, by=id)

    def _rate(
        self, pairs: Sequence[tuple[str, str]], data: TrainingData, stack: Stack, id: str
    ) -> list[float]:
        """S_final of each pair. Raters are loaded one after the other."""
        config = self.config
        asks = [text.replace("{k}", str(config.scale)) for text in config.prompts or RATINGS]
        S_sent, theta = [], []
        for name in config.raters:
            # The base rates, packed if it is, and not what is trained on it.
            packed = {part.owner for part in stack.ledger.all(ReplacedPart)}
            with stack.disabled(*(id for id in stack.plugins if id not in packed)):
                by = stack if name == SELF else Stack(name, device=str(stack.model.device))
                _refuse(f"{id}: rater '{name}'", by.model)
                rater = Rater(by, config.scale, config.batch_size, f"{id}: rater '{name}'")
                rater.fits([rating(ask, "", "") for ask in asks])
                # Packed weights are not those that the rater is named by.
                cache = None if by is stack and packed else kept_file(rater.name, by)
                worker = Worker(rater, config.scores, progress=data.progress, cache=cache)
                asked = Lazy(
                    len(pairs) * len(asks),
                    lambda n: (rating(asks[n % len(asks)], *pairs[n // len(asks)]), ""),
                )
                S_tok = torch.tensor(worker.score(asked), dtype=torch.float64)
            S_sent.append(sentence_level(S_tok.view(len(pairs), len(asks)), config.alpha))
            theta.append(by.model.num_parameters())
        found: list[float] = model_level(torch.stack(S_sent), theta).tolist()
        return found


def best(scores: Mapping[int, float], pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Places by their scores, the best first; equals by a hash of their text: all may be equal, and more text than
    memory holds."""
    rounded = {i: -round(score, 6) for i, score in scores.items()}
    equals = groupby(sorted(rounded, key=rounded.__getitem__), key=rounded.__getitem__)
    return [
        i
        for _, places in equals
        for i in sorted(places, key=lambda i: sha256(json.dumps(pairs[i]).encode()).digest())
    ]


def token_level(q: Tensor) -> Tensor:
    """S_tok of q [..., K] -> [...]; of equal ratings the lowest counts."""
    best, place = q.max(-1)
    return (place + 1) * (best[..., None] - q).sum(-1) / (q.shape[-1] - 1)


def sentence_level(S_tok: Tensor, alpha: float) -> Tensor:
    """S_sent of S_tok [N, prompts] -> [N], with the spread of the prompts that there are (not of a sample)."""
    return S_tok.mean(-1) / (1 + alpha * S_tok.std(-1, unbiased=False))


def model_level(S_sent: Tensor, theta: Sequence[float]) -> Tensor:
    """S_final of S_sent [raters, N] -> [N]."""
    weights = torch.tensor(theta, dtype=S_sent.dtype)
    return weights / weights.sum() @ S_sent


def rating(ask: str, x: str, y: str) -> str:
    """What a rater reads; a digit follows."""
    return f"{ask}\n\nInstruction: {x}\n\nResponse: {y}{END}"


class Rater(OfStack):
    """Scores a rating prompt with S_tok, so that a `Worker` keeps it by what was rated and by whom. It is a number: the
    K that it is made of, which a worker takes as text, made a run over 200,000 rows hold 1.0 GB more instead of 0.2.

    Raises:
        UnsupportedError: a digit is not one token.
    """

    def __init__(self, stack: Kernel, scale: int, batch_size: int, who: str) -> None:
        super().__init__(stack, batch_size=batch_size)
        self.who = who
        tokens = {str(k): following_ids(stack.tokenizer, str(k)) for k in range(1, scale + 1)}
        if bad := next((k for k, ids in tokens.items() if len(ids) != 1), None):
            raise UnsupportedError(
                f"{who}: its tokenizer makes {len(tokens[bad])} tokens of '{bad}', and a rating is one token",
                hint="another rater, or a smaller scale",
            )
        self.digits = [ids[0] for ids in tokens.values()]
        self.room = context_window(stack.model, stack.tokenizer)
        self.end = len(following_ids(stack.tokenizer, END))
        self.name = f"rater:{stack.base_id}:{stack.base_fingerprint}:{scale}"

    def fits(self, empty: Sequence[str]) -> None:
        """Raises DataError where a rating prompt leaves no room for a pair."""
        longest = max(len(prompt_ids(self.stack.tokenizer, text)) for text in empty)
        if longest >= self.room:
            raise DataError(
                f"{self.who}: a rating prompt has {longest} tokens by itself, and the model reads {self.room}",
                hint="shorter `prompts`, or another rater",
            )

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """S_tok of each rating prompt; no text stands behind it. Of one that is too long the end of the response is
        left out."""
        requests = []
        for prompt, _ in pairs:
            ids = prompt_ids(self.stack.tokenizer, prompt)
            if len(ids) > self.room:
                ids = ids[: self.room - self.end] + ids[-self.end :]
            requests.append(
                Request(inputs=ids, first=len(ids) - 1, targets=[[digit] for digit in self.digits])
            )
        found = score_requests(self.stack.model, requests, batch_size=self.batch_size)
        logs = torch.tensor([[float(log) for (log,) in row] for row in found], dtype=torch.float64)
        S_tok: list[float] = token_level(logs.softmax(-1)).tolist()  # softmax of log P: P over its sum
        return S_tok


def _refuse(who: str, model: Any) -> None:
    """Raises ArchitectureError for a model that does not continue a text."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ArchitectureError(
            f"{who}: {type(model).__name__} does not continue a text, so it gives no rating",
            hint="take a decoder as the rater: raters: [a folder or a hub id]",
        )
