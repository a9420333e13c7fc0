"""User profiles: a language model makes and updates key-value profiles of a person, and says how sure it is.

"User Profile with Large Language Models: Construction, Updating, and Benchmarking" (arXiv:2502.10660), of which the
abstract was at hand. A profile P = {(key_i, value_i)} is written as lines `key: value` (JSON strings where a key or
value would not survive that), so parse(serialise(P)) = P.

    construction   p(P  | T)           T: a passage
    updating       p(P' | P, T')       T': a new text; fields that it leaves alone stay, others change, new ones come
    loss         = - sum_t log p(w_t | w_<t, prompt)        w: the tokens of the serialised target alone, and EOS

With `edits` the model writes what changes alone, P' - P, and code merges it: merge(P, P' - P) = P'. That is ours.
Updating pairs can be made of construction rows: P is the gold profile of T with fields left out or given the value of
another row, P' the gold profile, so the edit is known. Generated profiles are compared with the gold ones:

    precision = matched / generated,  recall = matched / gold,  F1 = 2 matched / (generated + gold)       over all rows
    p(value_i | key_i, fields before, prompt) = prod of the probabilities of the value's tokens and of what ends it
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, chain
from random import Random
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from pydantic import Field

from peftx import Claim, Evaluation, ModelView, Plugin, PluginConfig, TrainingData, hookimpl
from peftx.engines.data import Place, Where, inside, prompt_ids, text_ids
from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.evaluation import Request, context_window, score_requests

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftx.kernel.stack import Stack

Profile = dict[str, str]
EMPTY = "none"  # an empty profile's line; it has no colon, so it reads as no field
KINDS = ("kept", "changed", "added", "removed")
QUOTED = re.compile(r'"([^"\\\x00-\x1f]|\\(["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')  # a JSON string
FIELD = re.compile(rf'(?P<key>{QUOTED.pattern}|[^":][^:]*?)\s*:\s*(?P<value>.*)')


class UserProfileConfig(PluginConfig):
    """Options of user profiles."""

    updates: float = Field(
        0.0, ge=0, le=1, description="share of construction rows that give an updating row too"
    )
    edits: bool = Field(
        False, description="in updating the model writes the fields that change alone, and they are merged"
    )
    fuzzy: float = Field(
        0.8, gt=0, le=1, description="least similarity at which the fuzzy scores match two values"
    )
    max_new_tokens: int = Field(128, ge=1, description="tokens that a generated profile may have")
    batch_size: int = Field(8, ge=1, description="rows that are generated and scored at once")
    probabilities: bool = Field(
        True, description="evaluate p(value | key, ...) of gold and of generated fields"
    )


# ------------------------------------------------------------------------------------------------------- profiles
def serialise(profile: Mapping[str, str]) -> str:
    """One line a field, in the profile's order."""
    lines = [f"{_quoted(key, plain=':' not in key)}: {_quoted(value)}" for key, value in profile.items()]
    return "\n".join(lines) or EMPTY


def _quoted(text: str, *, plain: bool = True) -> str:
    plain = plain and bool(text) and text.isprintable() and text == text.strip() and text[0] != '"'
    return text if plain else json.dumps(text)


def parse(text: str) -> Profile:
    """The fields of a text; a line that is no field is left out, and a key's first value counts."""
    profile: Profile = {}
    for line in text.split("\n"):
        if found := FIELD.fullmatch(line.strip()):
            parts = found["key"], found["value"]
            key, value = (json.loads(part) if QUOTED.fullmatch(part) else part for part in parts)
            profile.setdefault(key, value)
    return profile


def difference(old: Profile, new: Profile) -> Profile:
    """What turns `old` into `new`: fields that change or are new, and those that go, with an empty value, which no
    field of a profile has."""
    return {key: new.get(key, "") for key in old | new if old.get(key) != new.get(key)}


def merge(old: Profile, changes: Profile) -> Profile:
    """The inverse: `merge(old, difference(old, new)) == new`."""
    return {key: value for key, value in (old | changes).items() if value}


def normalise(text: str) -> str:
    """Case folded, letters and digits only (if there are any), one space between words: `Home_City` is `home city`."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text


def matched(predicted: Profile, gold: Profile, fuzzy: float | None = None) -> set[str]:
    """Keys of `gold` whose field is predicted: the same strings; with `fuzzy`, keys alike when normalised, and values
    too, or similar by 2 M / T of `difflib` on the normalised ones."""
    if fuzzy is None:
        return {key for key, value in gold.items() if predicted.get(key) == value}
    values = {normalise(key): normalise(value) for key, value in predicted.items()}
    found = {key: (values.get(normalise(key)), normalise(value)) for key, value in gold.items()}
    pairs = ((key, pair) for key, pair in found.items() if pair[0] is not None)
    return {key for key, pair in pairs if SequenceMatcher(None, *pair).ratio() >= fuzzy}


def edits(old: Profile, gold: Profile, predicted: Profile) -> Counter[str]:
    """Of an update, for each kind of field how many there are, and `<kind> right`; `edits` and `spurious`: fields that
    the prediction changed or added, and those of them that are not gold."""
    found: Counter[str] = Counter()
    for key in old | gold:
        was, now = old.get(key), gold.get(key)
        kind = "kept" if was == now else "added" if was is None else "removed" if now is None else "changed"
        found[kind] += 1
        found[f"{kind} right"] += predicted.get(key) == now
    made = [key for key, value in predicted.items() if old.get(key) != value]
    found.update(edits=len(made), spurious=sum(predicted[key] != gold.get(key) for key in made))
    return found


# ----------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Task:
    """One example: construction where `old` is None, else updating, with `edits` by what changes alone."""

    text: str
    gold: Profile
    old: Profile | None = None
    edits: bool = False

    @property
    def name(self) -> str:
        return "construction" if self.old is None else "updating"

    @property
    def prompt(self) -> str:
        if self.old is None:
            return f"Text: {self.text}\n\nProfile:\n"
        asked = "Changes" if self.edits else "New profile"
        return f"Old profile:\n{serialise(self.old)}\n\nText: {self.text}\n\n{asked}:\n"

    @property
    def target(self) -> Profile:
        """What the model is to write."""
        return self.gold if self.old is None or not self.edits else difference(self.old, self.gold)

    def merged(self, written: Profile) -> Profile:
        """The profile that was meant by what was written."""
        return written if self.old is None or not self.edits else merge(self.old, written)


def read_task(row: Mapping[str, Any], where: Where, *, edits: bool = False) -> Task:
    """A row with `text`, `profile`, and for updating `old_profile`; DataError for one that cannot be learned."""
    text, gold, before = (row.get(name) for name in ("text", "profile", "old_profile"))
    if not isinstance(text, str) or gold is None:
        raise DataError(f"user-profile: {where} needs 'text' and 'profile'; it has {', '.join(row)}")
    new = read_profile(gold, inside(where, "profile"))
    old = None if before is None else read_profile(before, inside(where, "old_profile"))
    if not text.strip() and old != new:
        why = "a profile is made of one" if old is None else "yet the profile changes"
        raise DataError(f"user-profile: {where} has an empty text, and {why}")
    return Task(text.strip(), new, old, edits)


def read_profile(value: Any, where: Where) -> Profile:
    """An object of strings, or its JSON text. A null is a field that is not there, as tables fill missing columns."""
    pairs = value
    if isinstance(value, str):
        try:
            pairs = json.loads(value, object_pairs_hook=tuple)
        except ValueError as error:
            raise DataError(f"user-profile: {where} is no JSON: {error}", hint='{"name": "Ann"}') from error
    pairs = tuple(pairs.items()) if isinstance(pairs, Mapping) else pairs
    if not isinstance(pairs, tuple):
        raise DataError(f"user-profile: {where} must be an object of strings, got {value!r:.60}")
    fields = [(key, item) for key, item in pairs if item is not None]
    names: dict[str, str] = {}
    for key, item in fields:
        if not isinstance(item, str) or not item.strip() or not key.strip():
            said = f"{key!r} is {item!r}; keys and values are texts, not empty"
            raise DataError(f"user-profile: {where}: {said}")
        if (name := normalise(key)) in names:
            said = f"the keys {names[name]!r} and {key!r} clash: both read as {name!r}"
            hint = "give each field a name of its own, beyond case and punctuation"
            raise DataError(f"user-profile: {where}: {said}", hint=hint)
        names[name] = key
    return dict(fields)


def perturb(gold: Profile, others: Mapping[str, list[str]], rng: Random) -> Profile:
    """The gold profile with one field at least, and each other one with chance 1/3, left out or given another value."""
    certain = rng.choice(list(gold))
    old = {}
    for key, value in gold.items():
        choices = [other for other in others[key] if other != value]
        if key != certain and rng.random() >= 1 / 3:
            old[key] = value
        elif choices and rng.random() < 1 / 2:
            old[key] = rng.choice(choices)
    return old


# --------------------------------------------------------------------------------------------------- probabilities
def field_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, Profile]],
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """p(value_i | key_i, fields before, prompt) for pairs of a prompt and a profile, given or generated."""
    if model.config.is_encoder_decoder or not tokenizer.is_fast:
        said = "user-profile: probabilities of fields need a decoder and a fast tokenizer"
        raise UnsupportedError(said, hint="set probabilities: false")
    requests, places = [], []
    for prompt, profile in pairs:
        completion = serialise(profile)
        found = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        target = [*found["input_ids"], tokenizer.eos_token_id]
        offsets = [*found["offset_mapping"], (len(completion), len(completion) + 1)]
        head = prompt_ids(tokenizer, prompt)
        requests.append(Request(inputs=head + target[:-1], first=len(head) - 1, targets=[target]))
        # With the line break, or EOS, that says that a value is over.
        ends = accumulate(len(line) + 1 for line in completion.split("\n"))
        spans = {
            key: [i for i, (a, b) in enumerate(offsets) if b >= end - len(_quoted(value)) and a < end]
            for (key, value), end in zip(profile.items(), ends, strict=False)
        }
        places.append(spans)
    scores = score_requests(model, requests, batch_size=batch_size)
    return [
        {key: math.exp(float(logs[0][tokens].sum())) for key, tokens in spans.items()}
        for logs, spans in zip(scores, places, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- plugin
class UserProfile(Plugin):
    """See the module."""

    Config = UserProfileConfig
    config: UserProfileConfig
    claims = {Claim.NEW_ROWS, Claim.READS_COLUMNS}
    takes = ("text",)  # with `profile` beside it
    gives = {"text": "prompt-completion"}
    refuses = {
        "bert": "it writes no profile",
        "t5": "probabilities of fields are read in one tower; without them it works",
    }
    example = {"max_new_tokens": 8}
    example_rows = (
        {"text": "I am Ann, from Rome.", "profile": {"name": "Ann", "city": "Rome"}},
        {"text": "Moved to Oslo.", "old_profile": {"city": "Rome"}, "profile": {"city": "Oslo"}},
        {"text": "Hello!", "old_profile": {"job": "cook"}, "profile": {"job": "cook"}},
    )

    def suits(self, model: ModelView) -> None:
        check_writes(model, alone=False)
        if self.config.probabilities and model.config.is_encoder_decoder:
            said = f"{type(model.module).__name__} has two towers, and probabilities of fields need a decoder alone"
            raise ArchitectureError(f"{model.owner}: {said}", hint="set probabilities: false")

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        """Rows with `text`, `profile` and perhaps `old_profile` become prompts and completions."""
        if data.train is not None:
            tasks = self._tasks(data.train)
            data.train = self._rows(tasks + self._made(tasks, data.rng("user-profile")), data)
        if data.eval is not None:
            data.eval = self._rows(self._tasks(data.eval), data)
        data.format = "prompt-completion"

    def _tasks(self, rows: Sequence[Mapping[str, Any]]) -> list[Task]:
        tasks = [read_task(row, Place(rows, i), edits=self.config.edits) for i, row in enumerate(rows)]
        if not tasks:
            raise DataError("user-profile: there are no rows")
        return tasks

    def _made(self, tasks: list[Task], rng: Random) -> list[Task]:
        built = [task for task in tasks if task.old is None and task.gold]
        chosen = [task for task in built if rng.random() < self.config.updates]
        if self.config.updates and not built:
            said = f"updates is {self.config.updates}, and no row is a construction with fields"
            raise DataError(f"user-profile: {said}", hint="leave updates out; the rows are updates already")
        others = defaultdict[str, list[str]](list)
        for key, value in chain.from_iterable(task.gold.items() for task in tasks):
            others[key].append(value)
        return [Task(t.text, t.gold, perturb(t.gold, others, rng), self.config.edits) for t in chosen]

    @staticmethod
    def _rows(tasks: list[Task], data: TrainingData) -> Dataset:
        for task in tasks:
            if (length := sum(_lengths(task, data.tokenizer))) > data.max_length:
                said = f"a row of {task.name} has {length} tokens, max_length is {data.max_length}"
                risk = f"what is cut may hold fields: {task.text!r:.60}"
                hint = "raise max_length, or leave out long rows"
                raise DataError(f"user-profile: {said}, and {risk}", hint=hint)
        rows = [{"prompt": t.prompt, "completion": serialise(t.target), "task": t.name} for t in tasks]
        return Dataset.from_list(rows)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add the scores of the module for each task that has rows: see the README."""
        stack, size, tasks = evaluation.stack, self.config.batch_size, self._tasks(evaluation.rows("eval"))
        self._check_room(tasks, stack)
        written: list[Profile] = []
        for begin in range(0, len(tasks), size):
            prompts = [task.prompt for task in tasks[begin : begin + size]]
            texts = stack.generate(prompts, max_new_tokens=self.config.max_new_tokens, do_sample=False)
            written += map(parse, texts)
        for name in ("construction", "updating"):
            pairs = [pair for pair in zip(tasks, written, strict=True) if pair[0].name == name]
            if pairs:
                self._score(evaluation, name, [(task, task.merged(own)) for task, own in pairs])
                if self.config.probabilities:
                    self._believe(evaluation, name, pairs)

    def _check_room(self, tasks: Sequence[Task], stack: Stack) -> None:
        """Raise for a prompt that leaves the model no room for an answer: it would be read from wrong positions."""
        window, apart = context_window(stack.model, stack.tokenizer), stack.model.config.is_encoder_decoder
        for index, task in enumerate(tasks):
            prompt, target = _lengths(task, stack.tokenizer)
            behind = [(self.config.max_new_tokens, "max_new_tokens")]
            behind += [(target, "what is to be written and EOS")] * self.config.probabilities
            count, name = max(behind)
            if (max(prompt, count) if apart else prompt + count) > window:
                said = f"row {index} (counting from 0) has a prompt of {prompt} tokens, and with {count} for {name}"
                more = f"that is more than the {window} that the model reads"
                hint = "lower max_new_tokens, or leave out long rows"
                raise DataError(f"user-profile: {said} {more}", hint=hint)

    def _score(self, evaluation: Evaluation, name: str, pairs: list[tuple[Task, Profile]]) -> None:
        made, gold = [len(answer) for _, answer in pairs], [len(task.gold) for task, _ in pairs]
        both = [a + b for a, b in zip(made, gold, strict=True)]
        for label, fuzzy in (("", None), ("fuzzy-", self.config.fuzzy)):
            hits = [len(matched(answer, task.gold, fuzzy)) for task, answer in pairs]
            f1 = ("f1", [2 * hit for hit in hits], both)
            for score, top, bottom in (("precision", hits, made), ("recall", hits, gold), f1):
                if filled := [pair for pair in zip(top, bottom, strict=True) if pair[1]]:
                    evaluation.add_ratio(f"{name}/{label}{score}", *zip(*filled, strict=True))
                else:
                    evaluation.add(f"{name}/{label}{score}", not any(both), count=0)
        if name == "updating":
            found = sum((edits(task.old or {}, task.gold, answer) for task, answer in pairs), Counter())
            shares = [(kind, found[f"{kind} right"], found[kind]) for kind in KINDS]
            for kind, part, whole in (*shares, ("spurious", found["spurious"], found["edits"])):
                if whole:
                    evaluation.add_share(f"updating/{kind}", part, whole)

    def _believe(self, evaluation: Evaluation, name: str, pairs: list[tuple[Task, Profile]]) -> None:
        stack, size = evaluation.stack, self.config.batch_size
        given = [(task.prompt, task.target) for task, _ in pairs], [(task.prompt, own) for task, own in pairs]
        gold, own = (field_probabilities(stack.model, stack.tokenizer, some, size) for some in given)
        whole = [p for fields in gold for p in fields.values()]
        groups: dict[str, list[float]] = {"": whole, "-right": [], "-wrong": []}
        for (task, written), fields in zip(pairs, own, strict=True):
            for key, p in fields.items():
                of = "-right" if written[key] == task.target.get(key) else "-wrong"
                groups[of].append(p)
        for of, values in groups.items():
            if values:
                evaluation.add(f"{name}/probability{of}", sum(values) / len(values), count=len(values))


def _lengths(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens of the prompt, and of what is to be written with EOS."""
    return len(prompt_ids(tokenizer, task.prompt)), len(text_ids(tokenizer, serialise(task.target))) + 1
