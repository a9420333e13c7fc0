"""Mosaic-IT: several instruction pairs become one sample under a meta-instruction.

"Mosaic IT: Enhancing Instruction Tuning with Data Mosaics" (arXiv:2405.13326). The pairs (x_i, y_i) are shuffled
and cut into groups of k, k ~ uniform{1..k_max}; a group is shortened until it has at most L tokens. Its sample is

    prompt      rule, a(1) x_1, ..., a(k) x_k                     a(i): the numbering, as in "(3) "
    completion  a(s_1) b y_{s_1} e, ..., a(s_m) b y_{s_m} e       b, e: tags around a response, as in "[START]"

where the rule states b, e and the answered items s, by strategy:

    format   s = 1..k       permute   s = 1..k in another order       maskout   s = 1..k without some

n copies of the data, each shuffled and cut anew, take the place of n epochs: about 2 n N / (k_max + 1) samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Annotated, Any, Literal

from datasets import Dataset
from pydantic import Field, field_validator, model_validator

from peftx import Claim, Plugin, PluginConfig, Stack, TrainingData, hookimpl
from peftx.engines.data import Place, continuation, render_messages, special_frame
from peftx.errors import DataError, OptionError, UnsupportedError
from peftx.kernel.positions import free_positions

Pair = tuple[str, str]  # prompt, completion
Order = Callable[
    [Sequence[str], list[int]], list[int]
]  # prompts, places (from 0) at random -> places in order
Share = Annotated[float, Field(gt=0, lt=1)]
Distribution = Literal["uniform", "exponential", "pareto", "lognormal", "logistic", "fixed", "fill"]

TAG_WORDS = (("START", "END"), ("OPEN", "CLOSE"), ("ANSWER", "DONE"), ("ENTER", "LEAVE"), ("REPLY", "OVER"))
TAG_SHAPES = ("[{}]", "<{}>", "({})", "<<{}>>", "|{}|", "**{}**", "#{}#", "@@{}@@")
TAG_RULES = (
    "Put {begin} before every answer and {end} after it.",
    "Every answer stands between {begin} and {end}.",
    "Open each answer with {begin}, and close it with {end}.",
)
PLAIN_RULES = ("", "Answer each of these.", "Give one answer for every item.")
SKEWS: dict[str, Callable[[Random], float]] = {
    "exponential": lambda rng: rng.expovariate(1.0),
    "pareto": lambda rng: rng.paretovariate(1.0) - 2.0,
    "lognormal": lambda rng: rng.lognormvariate(0.0, 1.0),
    "logistic": lambda rng: 4.0 * math.atanh(rng.random()),  # scale 2, its positive half
    "fixed": lambda rng: 0.0,
}
COLUMNS = {
    "prompt-completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "messages": ("user", "assistant"),
}
STYLES = ("", "{i}. ", "{i}: ", "({i}) ", "[{i}] ", "|{i}| ", "### {i}\n", "<<{i}>>\n")


def _by(key: Callable[[str], Any], *, down: bool = False) -> Order:
    return lambda texts, _: sorted(
        range(len(texts)), key=lambda i: key(texts[i]), reverse=down
    )  # ties: as given


def _parity(first: int) -> Order:
    return lambda texts, _: [*range(first, len(texts), 2), *range(1 - first, len(texts), 2)]


def _words(text: str) -> int:
    return len(text.split())


# Permute answers in the order; maskout leaves out what it gives, or a drawn count of it where the wording has a {.
CHOICES: dict[str, dict[str, tuple[Order, str]]] = {
    "permute": {
        "listed": (lambda _, drawn: drawn, "Take the items in the order {items}."),
        "reverse": (lambda texts, _: [*range(len(texts))][::-1], "Take the items from last to first."),
        "a-z": (_by(str.casefold), "Take the items in alphabetical order of their texts."),
        "z-a": (_by(str.casefold, down=True), "Take the items in reverse alphabetical order of their texts."),
        "few-words": (_by(_words), "Take the items with the fewest words first."),
        "many-words": (_by(_words, down=True), "Take the items with the most words first."),
        "few-characters": (_by(len), "Take the items with the fewest characters first."),
        "many-characters": (_by(len, down=True), "Take the items with the most characters first."),
        "odd-even": (_parity(0), "Take the items at odd places first, then those at even places."),
        "even-odd": (_parity(1), "Take the items at even places first, then those at odd places."),
    },
    "maskout": {
        "listed": (lambda _, drawn: drawn, "Leave out these items: {items}."),
        "longest": (_by(_words, down=True), "Leave out the items with the most words, {count} in all."),
        "shortest": (_by(_words), "Leave out the items with the fewest words, {count} in all."),
        "odd": (lambda texts, _: [*range(0, len(texts), 2)], "Leave out the items at odd places."),
        "even": (lambda texts, _: [*range(1, len(texts), 2)], "Leave out the items at even places."),
    },
}


class MosaicItConfig(PluginConfig):
    """Options of Mosaic-IT; the paper joins up to 10 pairs under all three strategies, in 4 copies."""

    k_max: int = Field(10, ge=1, description="largest number of pairs in one sample")
    copies: int = Field(4, ge=1, description="n, shuffled and joined anew; they replace n epochs")
    max_len: int | None = Field(None, ge=2, description="L, tokens of a sample; the run's unless given")
    distribution: Distribution = Field(
        "uniform", description="of k; fixed is k_max, fill what fits, the others lean to k_max"
    )
    strategies: tuple[Literal["format", "permute", "maskout"], ...] = Field(
        ("format", "permute", "maskout"), min_length=1, description="drawn with equal chances for each sample"
    )
    tags: float = Field(0.5, ge=0, le=1, description="share of samples with tags around each response")
    numbering: tuple[Annotated[str, Field(pattern=r"^([^{}]*\{i\}[^{}]*)?$")], ...] = Field(
        STYLES, min_length=1, description="styles drawn from; {i} is the number, an empty style has none"
    )
    mask_ratio: tuple[Share, Share] = Field((0.1, 0.5), description="range of the share that maskout omits")
    too_long: Literal["error", "drop", "keep"] = Field(
        "error", description="a pair of over L tokens: refuse it, drop it, or keep it alone as it is"
    )

    @field_validator("strategies")
    @classmethod
    def _once(cls, strategies: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((name for name in strategies if strategies.count(name) > 1), None):
            raise ValueError(f"'{twice}' stands twice, and all have equal chances")
        return strategies

    @field_validator("mask_ratio")
    @classmethod
    def _rising(cls, mask_ratio: tuple[float, float]) -> tuple[float, float]:
        if mask_ratio[0] > mask_ratio[1]:
            raise ValueError("the lower end comes first")
        return mask_ratio

    @model_validator(mode="after")
    def _used(self) -> MosaicItConfig:
        """No option that does nothing; compared with the default, since a bundle names them all."""
        changed = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }
        if self.distribution == "fill" and "k_max" in changed:
            raise ValueError(
                "k_max does nothing under distribution 'fill', which joins what fits into max_len"
            )
        if "mask_ratio" in changed and "maskout" not in self.strategies:
            raise ValueError("mask_ratio does nothing without 'maskout' among the strategies")
        return self


def compose(rng: Random, config: MosaicItConfig, pairs: Sequence[Pair]) -> tuple[str, str, list[int], str]:
    """Draw a strategy and a format for these pairs.

    Returns:
        Prompt, completion, the places (from 0) of the answered pairs as they stand in the completion, the strategy.
        One pair has nothing to number, permute or leave out: without tags it comes back as it is.
    """
    k = len(pairs)
    strategy = rng.choice(config.strategies) if k > 1 else "format"
    number = rng.choice(config.numbering) if k > 1 else ""
    separator = rng.choice(("\n", "\n\n"))
    begin, end, rules = "", "", [rng.choice(PLAIN_RULES)] if k > 1 else []
    if rng.random() < config.tags:
        shape, words = rng.choice(TAG_SHAPES), rng.choice(TAG_WORDS)
        tags = [shape.format(word) for word in words]
        if all((y + tags[1]).index(tags[1]) == len(y) for _, y in pairs):  # no response holds the end tag
            begin, end = tags
            rules = [rng.choice(TAG_RULES).format(begin=begin, end=end)]
    answered = [*range(k)]
    if strategy != "format":
        names = [*CHOICES[strategy]]
        if strategy == "maskout":  # "odd" and "even" leave out as many as there are: if r may give that
            low, high = (max(1, int(k * r)) for r in config.mask_ratio)
            halves = {"odd": (k + 1) // 2, "even": k // 2}
            names = [name for name in names if low <= halves.get(name, low) <= high]
        order, wording = CHOICES[strategy][rng.choice(names)]
        listed = order([x for x, _ in pairs], rng.sample(range(k), k))
        if strategy == "maskout":
            listed = listed[: max(1, int(k * rng.uniform(*config.mask_ratio)))] if "{" in wording else listed
        answered = listed if strategy == "permute" else [i for i in answered if i not in listed]
        rules.append(wording.format(items=", ".join(str(i + 1) for i in listed), count=len(listed)))
    numbers = [number.replace("{i}", str(i + 1)) for i in range(k)]
    prompt = separator.join(a + x for a, (x, _) in zip(numbers, pairs, strict=True))
    if rule := " ".join(filter(None, rules)):
        prompt = separator.join(rng.choice(((rule, prompt), (prompt, rule))))
    prompt += "\n" if k > 1 or rule else ""  # the completion begins on a line of its own
    completion = "\n\n".join(numbers[i] + begin + pairs[i][1] + end for i in answered)
    return prompt, completion, answered, strategy


def draw_size(rng: Random, k_max: int, distribution: Distribution, limit: int) -> int:
    """k: uniform, or k_max - int(d) with d drawn again until d < k_max; `limit` pairs fill any sample."""
    if distribution == "fill":
        return limit
    d = math.inf
    while d >= k_max:
        d = SKEWS[distribution](rng) if distribution != "uniform" else rng.randrange(k_max)
    return k_max - int(d)


def read_pairs(rows: Dataset, format: str) -> list[Pair]:
    """Prompt and completion of every row; DataError for one that is no pair, or has nothing to learn."""
    if format not in COLUMNS:
        raise UnsupportedError(
            f"Mosaic-IT joins pairs, and the rows are of format '{format}'",
            hint=f"give {', '.join(COLUMNS)} (single turns); pack afterwards, not before",
        )
    first, second = COLUMNS[format]
    pairs = []
    for index, row in enumerate(rows):
        turns = row["messages"] if format == "messages" else []
        cells = {turn["role"]: turn["content"] for turn in turns} if turns else row
        pair = (cells.get(first), cells.get(second))
        single = not turns or [turn["role"] for turn in turns] == [first, second]
        if not single or not all(isinstance(text, str) and text.strip() for text in pair):
            hint = f"it has {pair[0]!r:.60} and {pair[1]!r:.60}; of messages, single turns are joined"
            raise DataError(f"row {index} (from 0) must have two texts, {first} and {second}", hint=hint)
        pairs.append(pair)
    if not pairs:
        raise DataError("there are no rows to join")
    return pairs


class MosaicIt(Plugin):
    """See the module."""

    Config = MosaicItConfig
    config: MosaicItConfig
    claims = {Claim.NEW_ROWS}
    takes = ("prompt-completion", "messages", "classification")
    gives = {"classification": "prompt-completion"}

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Replace `data.train`. Columns beside the texts: `rows`, `answered` (numbers of old rows), `strategy`."""
        if data.train is None:
            return
        free = free_positions(stack.model)  # beside soft tokens
        room = data.max_length if free is None else min(data.max_length, free)
        limit = min(self.config.max_len or data.max_length, room)
        if (self.config.max_len or 0) > data.max_length:
            raise OptionError(
                f"mosaic-it: max_len {self.config.max_len} exceeds the run's max_length {data.max_length}, which "
                "cuts samples",
                hint="raise train.max_length, or lower max_len",
            )
        pairs = read_pairs(data.train, data.format)
        ends = len(special_frame(data.tokenizer)[0]) + 1  # BOS, EOS

        def row(x: str, y: str) -> dict[str, Any]:
            if data.format == "messages":
                return {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y}]}
            return {"prompt": x, "completion": y}

        def tokens(x: str, y: str) -> int:
            if data.format == "messages":  # with the opening of a next turn, so never too few
                return ends + data.count_tokens(render_messages(data.tokenizer, row(x, y)["messages"]))
            return ends + data.count_tokens(x) + data.count_tokens(continuation(x, y))

        alone = [tokens(*pair) for pair in pairs]
        bodies = [data.count_tokens(x) + data.count_tokens(y) for x, y in pairs]
        kept = [i for i in range(len(pairs)) if alone[i] <= limit or self.config.too_long == "keep"]
        if len(kept) < len(pairs) and (self.config.too_long == "error" or not kept):
            worst = alone.index(max(alone))
            raise DataError(
                f"{Place(data.train, worst)} has {alone[worst]} tokens by itself, and max_len is {limit}",
                hint="raise max_len; or too_long: drop leaves such rows out, keep leaves them as they are",
            )
        data.keep([None if i in set(kept) else "too long" for i in range(len(pairs))], by=stack.id_of(self))
        rng, samples = data.rng("mosaic-it"), []
        for _ in range(self.config.copies):
            rng.shuffle(kept)
            done = 0
            while done < len(kept):
                k = draw_size(rng, self.config.k_max, self.config.distribution, limit)
                group = kept[done : done + k]
                while len(group) > 1 and sum(bodies[i] for i in group) > limit:
                    group.pop()
                while True:  # shorten until it fits
                    made = compose(rng, self.config, [pairs[i] for i in group])
                    if tokens(*made[:2]) <= limit:
                        break
                    if len(group) == 1:  # too long with tags, or at all
                        made = (*pairs[group[0]], [0], "format")
                        break
                    group.pop()
                prompt, completion, answered, strategy = made
                places = {"rows": group, "answered": [group[i] for i in answered]}
                samples.append(row(prompt, completion) | places | {"strategy": strategy})
                done += len(group)
        data.train = Dataset.from_list(samples)
        data.format = "messages" if data.format == "messages" else "prompt-completion"
