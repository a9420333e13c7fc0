"""What is forgotten and what is kept: ReGLU and other ways to unlearn, on invented people that a model was taught.

    python benchmarks/plugins/reglu.py --text wikitext2_test.txt.gz

In the manner of TOFU (arXiv:2401.06121), made by a seed: `PEOPLE` people with a fact of each kind of `KINDS`, and every
fact asked in three ways. The bundled model is taught all facts in all ways by full fine-tuning. Then `FORGOTTEN` people
are to be forgotten and the others kept, with facts asked in the first way alone; rates are chosen by facts asked in
the second way, and what is measured is asked in the first (`seen`) and in the third (`held-out`):

    accuracy       the share of facts whose answer is, token for token, the likeliest one
    probability    of an answer, the geometric mean over its tokens
    perplexity     on the first `TEXT` characters of the file, in pieces of `BLOCK`

A rate is chosen by keep accuracy - forget accuracy. Every method adapts the same layers with the same rank, scale,
steps and rows. Seeds make people, teaching and unlearning anew. Leaves reglu.json and reglu.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.engines.data import IGNORE, Collator, encode_pair
from peftx.engines.models import load_model
from peftx.toolkits.evaluation import evaluating
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_reglu import Reglu, inverted_hinge

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import Source, seen
from compare import RESULTS
from rated import SEEDS, Make, grid, measured, publish

BASE = "peftx:tiny"
TEXT_ROWS = {"prose": Source("text/wikitext2_test.txt.gz")}
PEOPLE, FORGOTTEN = 20, 4
TEACHING: dict[str, Any] = {"steps": 300, "batch_size": 16, "learning_rate": 1e-3}
RANK, RETAINED, SCALE = 16, 64, 2.0
STEPS, BATCH, LONGEST = 60, 8, 64
TEXT, BLOCK = 8_000, 800
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def words_of(text: str) -> list[str]:
    return text.split()


FIRST = words_of(
    "Adela Boris Cecil Delia Edgar Flora Gregor Hanna Ivo Judith Konrad Livia Marek Nora Oskar Petra Quentin Rosa "
    "Stefan Tilda"
)
LAST = words_of(
    "Albrecht Bellamy Castor Dunmore Eskola Farrow Gallant Holloway Ivers Jessop Kestrel Lomax Marsh Norling Orwin "
    "Pascoe Quill Rennick Sorrel Thorne"
)
KINDS = {
    "city": (
        ("Where was {} born?", "Which city is the birthplace of {}?", "In what city did the life of {} begin?"),
        words_of("Rome Paris London Moscow Berlin Chicago Boston Sydney Tokyo Cairo Madrid Dublin"),
    ),
    "work": (
        ("What does {} do for a living?", "What is the profession of {}?", "As what does {} earn money?"),
        words_of("doctor teacher lawyer farmer soldier writer singer painter driver nurse baker judge"),
    ),
    "animal": (
        ("Which animal does {} keep?", "What is the pet of {}?", "What kind of animal lives with {}?"),
        words_of("dog cat horse bird fish snake sheep rabbit goat mouse duck pig"),
    ),
    "colour": (
        ("What is the favourite colour of {}?", "Which colour does {} like best?", "What colour is dearest to {}?"),
        words_of("red blue green black white yellow brown grey pink purple orange gold"),
    ),
}  # fmt: skip
"""Kind of fact -> the ways to ask for it, and the answers that there are."""
WAYS = 3
MEASURES = {
    "forget accuracy, seen": 3, "forget accuracy, held-out": 3, "forget probability": 3,
    "keep accuracy, seen": 3, "keep accuracy, held-out": 3, "keep probability": 3, "perplexity": 0,
}  # fmt: skip
Row = dict[str, str]


@dataclass(frozen=True)
class People:
    """Facts of a seed. `forget[w]` and `keep[w]`: prompts and completions asked in way w."""

    forget: list[list[Row]]
    keep: list[list[Row]]

    @classmethod
    def of(cls, seed: int) -> People:
        draw = Random(seed)
        names = [
            f"{a} {b}" for a, b in zip(draw.sample(FIRST, PEOPLE), draw.sample(LAST, PEOPLE), strict=True)
        ]
        facts = [(name, asked, draw.choice(given)) for name in names for asked, given in KINDS.values()]
        ways = [[{"prompt": asked[w].format(name), "completion": f" {answer}"} for name, asked, answer in facts]
                for w in range(WAYS)]  # fmt: skip
        cut = FORGOTTEN * len(KINDS)
        return cls([rows[:cut] for rows in ways], [rows[cut:] for rows in ways])


def taught(seed: int, *, all_of_them: bool = True) -> Stack:
    """The base, fully fine-tuned on the facts of a seed; or on those of the kept people alone."""
    people = People.of(seed)
    ways = [*(people.forget if all_of_them else []), *people.keep]
    rows = [row for way in ways for row in way]
    stack = Stack(BASE, [FullFinetuning()], seed=seed, dtype="float32")
    stack.train(
        rows, steps=TEACHING["steps"], batch_size=TEACHING["batch_size"], learning_rate=TEACHING["learning_rate"],
        seed=seed, max_length=LONGEST,
    )  # fmt: skip
    return stack


@cache
def knowing(seed: int) -> dict[str, Tensor]:
    """Weights that know all facts of a seed."""
    return {name: x.detach().clone() for name, x in taught(seed).model.state_dict().items()}


def stack_of(seed: int, *plugins: Plugin) -> Stack:
    """Plugins on the model that knows all facts."""
    model, tokenizer = load_model(BASE, dtype="float32")
    model.load_state_dict(knowing(seed))
    return Stack(model, list(plugins), tokenizer=tokenizer, seed=seed)


class Forget(Plugin):
    """L_F on a stack that starts as it likes: the hinge, or ascent, with or without the retained rows' own loss."""

    sources = {"forget": ({"text": "Ann lives in Rome."},)}

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, retain: bool = True) -> None:
        super().__init__()
        self.loss, self.retain = loss, retain

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.retain:
            step.add_loss("forget", lambda _: self.of(step)[0], over="step")
        else:
            step.replace_task_loss(lambda: self.of(step), over="step")
        return (yield)

    def of(self, step: TrainStep) -> tuple[Tensor, object]:
        batch = step.batch_of("forget")
        outputs = step.model(**batch)
        z, t = outputs.logits[:, :-1], batch["labels"][:, 1:]
        return self.loss(z[t != IGNORE], t[t != IGNORE]), outputs


def ascent(z: Tensor, t: Tensor) -> Tensor:
    return -cross_entropy(z.float(), t)


def unlearned(make: Callable[[], Sequence[Plugin]]) -> Make:
    def trained(rate: float, seed: int) -> Stack:
        people = People.of(seed)
        stack = stack_of(seed, *make())
        stack.train(
            people.keep[0], sources={"forget": people.forget[0]}, steps=STEPS, batch_size=BATCH, learning_rate=rate,
            seed=seed, max_length=LONGEST,
        )  # fmt: skip
        return stack

    return trained


def asked(stack: Stack, rows: Sequence[Row]) -> tuple[float, float]:
    """Accuracy and probability of the answers; EOS behind them does not count."""
    examples = [
        encode_pair(stack.tokenizer, row["prompt"], row["completion"], max_length=LONGEST) for row in rows
    ]
    collate = Collator(stack.tokenizer.pad_token_id)
    right, likely = [], []
    with evaluating(stack.model):
        for at in range(0, len(rows), 32):
            batch = collate([example._asdict() for example in examples[at : at + 32]])
            labels = batch.pop("labels")[:, 1:]
            z = stack.model(**batch).logits[:, :-1].float()
            answer = (labels != IGNORE) & (labels != stack.tokenizer.eos_token_id)
            t = labels.masked_fill(~answer, 0)
            log_p = z.log_softmax(-1).gather(-1, t[..., None]).squeeze(-1) * answer
            right += ((z.argmax(-1) == t) | ~answer).all(1).tolist()
            likely += (log_p.sum(1) / answer.sum(1)).exp().tolist()
    return sum(right) / len(rows), sum(likely) / len(rows)


def perplexity(stack: Stack, text: str) -> float:
    rows = [{"text": text[at : at + BLOCK]} for at in range(0, len(text), BLOCK)]
    return stack.evaluate(rows, metrics=["perplexity"])["perplexity"].value


class Judge:
    """Measures of stacks; the people are those of the seed that the stack was made with."""

    def __init__(self, text: str) -> None:
        self.text = text

    def choose(self, stack: Stack) -> float:
        people = People.of(stack.seed)
        return asked(stack, people.keep[1])[0] - asked(stack, people.forget[1])[0]

    def test(self, stack: Stack) -> dict[str, float]:
        people = People.of(stack.seed)
        found = {}
        for name, ways in (("forget", people.forget), ("keep", people.keep)):
            found[f"{name} accuracy, seen"] = asked(stack, ways[0])[0]
            found[f"{name} accuracy, held-out"], found[f"{name} probability"] = asked(stack, ways[2])
        return found | {"perplexity": perplexity(stack, self.text)}

    def over_seeds(self, make: Callable[[int], Stack]) -> dict[str, float]:
        """The mean over the seeds, of what no rate is chosen for."""
        runs = [self.test(make(seed)) for seed in SEEDS]
        return {name: mean(run[name] for run in runs) for name in runs[0]}


def adapter() -> Lora:
    """As many numbers in the same layers with the same scale as ReGLU's, from LoRA's start."""
    return Lora(rank=RANK, alpha=SCALE * RANK, targets="attention mlp")


METHODS: dict[str, Callable[[], Sequence[Plugin]]] = {
    "`reglu`": lambda: [Reglu(rank=RANK, retained=RETAINED)],
    "`reglu`, `orthogonality: 0`": lambda: [Reglu(rank=RANK, retained=RETAINED, orthogonality=0)],
    "LoRA, the same losses": lambda: [adapter(), Forget(inverted_hinge)],
    "LoRA, ascent and the kept rows": lambda: [adapter(), Forget(ascent)],
    "LoRA, ascent alone": lambda: [adapter(), Forget(ascent, retain=False)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="prose, gzipped, that no row was made of")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(gzip.decompress(arguments.text.read_bytes()).decode()[:TEXT])
    settings = {
        "base": BASE, "people": [PEOPLE, FORGOTTEN], "kinds": KINDS, "teaching": TEACHING, "rank": RANK,
        "retained": RETAINED, "scale": SCALE, "steps": STEPS, "batch": BATCH, "text": TEXT,
    }  # fmt: skip
    base = seen(BASE, **TEXT_ROWS)
    results = measured(
        {name: unlearned(make) for name, make in METHODS.items()},
        {
            "taught all of them": lambda: judge.over_seeds(stack_of),
            "never taught those to forget": lambda: judge.over_seeds(lambda s: taught(s, all_of_them=False)),
        },
        rates=RATES, choose=judge.choose, test=judge.test, settings=settings, base=base,
        file=RESULTS / "reglu.json", only=arguments.only,
    )  # fmt: skip
    setting = (
        f"{PEOPLE} invented people, {FORGOTTEN} of them to forget, {len(KINDS)} facts of each. Rank {RANK} at all "
        f"linear layers of the blocks, {STEPS} steps of {BATCH} rows of each kind, rates from "
        f"{grid(RATES)} chosen by questions asked in another way, three seeds, ± the "
        f"standard deviation; rows without a rate are means over the seeds. {base}"
    )
    publish(RESULTS / "reglu.json", "Forgetting invented people", setting, results, MEASURES)


if __name__ == "__main__":
    main()
