"""CLUE: equations by hand, planted clusters, and the properties of the ranking."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx_clue
from peftx import Claim, Plugin, Stack, VirtualTokens, hookimpl
from peftx.errors import ArchitectureError, DataError, PluginError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_clue import Clue, ClueConfig, Solution, cut, d, deltas, vote

MARKS = ("<think>", "</think>")
BEST = {"best": (1, 2)}

test_conformance = conformance("clue")


@cache
def model(arch: str = "llama") -> Any:
    return tiny(arch)


def stack_of(*plugins: Any, arch: str = "llama") -> Stack:
    return Stack(model(arch), list(plugins), tokenizer=tiny_tokenizer())


def planted(monkeypatch: pytest.MonkeyPatch, spread: float = 0.1, layers: int = 3) -> None:
    """Deltas of solutions are drawn around 1 where their text says `good`, and around -1 else."""

    def found(model: Any, tokenizer: Any, solutions: Any) -> Tensor:
        rows = []
        for s in solutions:
            noise = torch.Generator().manual_seed(sum(s.text.encode()))
            center = 1.0 if "good" in s.text else -1.0
            rows.append(center + spread * torch.randn(layers, 5, generator=noise))
        return torch.stack(rows)

    monkeypatch.setattr(peftx_clue, "deltas", found)


def problems(count: int = 6, answers: tuple[str, ...] = ("good 7", "bad 3", "bad 3", "bad 5")) -> list[Any]:
    return [
        {"prompt": f"{n}?", "completion": "7", "samples": [f"{n} {a}" for a in answers]} for n in range(count)
    ]


def scores(rows: Any, **options: Any) -> dict[str, float]:
    found = stack_of(Clue(**(BEST | options))).evaluate(rows, metrics=["clue"])
    return {name: score.value for name, score in found.items()}


# -- where a thought begins and ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "before", "thought", "rest"),
    [
        ("1+1?", "<think>hm</think> 2", "1+1? <think>", "hm</think>", " 2"),
        ("1+1?<think>\n", "hm</think>2", "1+1?<think>", "\nhm</think>", "2"),  # as chat templates end
        ("1+1?", "hm</think>2", "1+1?", " hm</think>", "2"),
        ("1+1?", "<think>hm", "1+1? <think>", "hm", ""),  # never done: no answer
        ("1+1? ", "it is 2", "1+1? ", "it is 2", "it is 2"),
        ("Use <think> and </think>. 1+1?", "2", "Use <think> and </think>. 1+1?", " 2", "2"),
        ("x", "<think>a</think>2<think>b</think>3", "x <think>", "a</think>", "2<think>b</think>3"),
        ("", "<think>a</think>2", "<think>", "a</think>", "2"),
    ],
)
def test_cut(prompt, text, before, thought, rest):
    assert cut(prompt, text, MARKS) == (before, thought, rest)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
def test_delta_is_the_move_of_states_between_two_tokens(arch):
    """Of solutions of several lengths in one batch, as each is read alone."""
    tokenizer = tiny_tokenizer()
    made = [
        Solution("", before, thought, None)
        for before, thought in (
            ("1+1?<think>", "well</think>"),
            ("What is 3?", " a longer thought, 3"),
            ("x", ""),
        )
    ]
    found = deltas(model(arch), tokenizer, made)
    assert found.dtype == torch.float32
    assert found.shape == (3, 2, 32)
    for s, delta in zip(made, found, strict=True):
        start = len(tokenizer(s.before)["input_ids"]) - 1
        ids = torch.tensor([tokenizer(s.before + s.thought)["input_ids"]])
        with torch.no_grad():
            states = model(arch)(input_ids=ids, output_hidden_states=True).hidden_states
        by_hand = torch.stack([h[0, -1] - h[0, start] for h in states[1:]])
        torch.testing.assert_close(delta, by_hand, atol=1e-5, rtol=1e-4)
    assert not found[0].eq(0).any()
    assert found[2].eq(0).all()  # nothing was thought


class Prompt(VirtualTokens):
    def rows(self) -> Tensor:
        return torch.ones(self.length, 32)


class Prompted(Plugin):
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}

    @hookimpl
    def inject(self, model: Any) -> None:
        model.prompt(Prompt(3))


def test_soft_tokens_do_not_move_the_two_places():
    plugin = Clue()
    stack = Stack(tiny("llama"), [Prompted(), plugin], tokenizer=tiny_tokenizer())
    solution = plugin.solution("1+1?", "it is 2")
    found = deltas(stack.model, stack.tokenizer, [solution])[0]
    ids = torch.tensor([stack.tokenizer("1+1? it is 2")["input_ids"]])
    with torch.no_grad(), stack.disabled():
        embedded = stack.model.get_input_embeddings()(ids)
        inputs = torch.cat((torch.ones(1, 3, 32), embedded), 1)
        states = stack.model(inputs_embeds=inputs, output_hidden_states=True).hidden_states[1:]
    start = 3 + len(stack.tokenizer("1+1?")["input_ids"]) - 1
    torch.testing.assert_close(
        found, torch.stack([h[0, -1] - h[0, start] for h in states]), atol=1e-5, rtol=1e-4
    )


# -- the equations -------------------------------------------------------------------------------------------------


def test_distance_by_hand():
    A = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert d(A, torch.zeros(2, 2)).tolist() == [3.0, 0.0]  # (5 + 1) / 2
    assert d(A, torch.tensor([[0.0, 0.0], [0.0, -3.0]])).tolist() == [4.5, 1.5]


def test_a_vector_added_at_both_places_changes_nothing(monkeypatch):
    """The decision hangs on the difference alone: what every token of a layer has in common goes."""
    plugin = Clue()
    s = [plugin.solution("1+1?", text) for text in ("2", "it is 3")]
    before = deltas(model(), tiny_tokenizer(), s)
    asked = model().forward

    def shifted(*args: Any, **options: Any) -> Any:
        output = asked(*args, **options)
        output.hidden_states = tuple(h + 3.0 * k for k, h in enumerate(output.hidden_states))
        return output

    monkeypatch.setattr(model(), "forward", shifted)
    torch.testing.assert_close(deltas(model(), tiny_tokenizer(), s), before, atol=1e-5, rtol=1e-4)


def test_centroids_are_means_whatever_the_batches():
    rows = problems(3)
    made = {}
    for size in (1, 3, 50):
        plugin = Clue(batch_size=size)
        stack = stack_of(plugin)
        plugin.learn(stack, rows)
        made[size] = plugin.V
    right = [plugin.solution(row["prompt"], text) for row in rows for text in row["samples"][:1]]
    mean = deltas(model(), tiny_tokenizer(), right).double().mean(0)
    for V in made.values():
        assert V[0].dtype == torch.float64
        assert float((V[0] - mean).abs().max()) < 1e-6
        assert float((V[1] - made[1][1]).abs().max()) < 1e-6
    assert not torch.allclose(*made[1])


def test_experience_is_balanced(monkeypatch):
    seen: list[list[str]] = []

    def found(model: Any, tokenizer: Any, solutions: Any) -> Tensor:
        seen.append([s.text for s in solutions])
        return torch.ones(len(solutions), 1, 1)

    monkeypatch.setattr(peftx_clue, "deltas", found)
    for per_class, most in ((10, 4), (3, 3)):  # four right ones, and twelve wrong ones
        seen.clear()
        plugin = Clue(per_class=per_class)
        plugin.learn(stack_of(plugin), problems(4, ("7", "3", "4", "5")))
        assert [len(texts) for texts in seen] == [most, most]
        assert len(set(seen[0] + seen[1])) == 2 * most
        assert all("7" in text for text in seen[0])
        assert not any("7" in text for text in seen[1])


def test_planted_clusters_are_told_apart(monkeypatch):
    planted(monkeypatch)
    found = scores(problems())
    assert [found[f"clue/verified{part}"] for part in ("", "/right", "/wrong")] == [1, 1, 1]
    assert found["clue/mean"] == 0.25
    assert found["clue/majority"] == 0  # 3, twice
    assert found["clue/top-maj-1"] == 1


def test_shuffled_labels_tell_nothing(monkeypatch):
    planted(monkeypatch)
    rows = problems(
        40, ("good 7", "bad 7", "good 3", "bad 3")
    )  # whether 7 stands there says nothing of the cluster
    found = scores(rows)
    assert found["clue/verified"] == 0.5


def test_the_sides_are_not_swapped(monkeypatch):
    """Experience by which the `bad` cluster is the right one turns every decision over."""
    planted(monkeypatch)
    turned = problems(3, ("bad 7", "good 3"))
    found = scores([*turned, *problems(3)])
    assert found["clue/verified"] == 0
    assert found["clue/top-maj-1"] == 0


# -- votes ---------------------------------------------------------------------------------------------------------


def test_vote_by_hand():
    assert vote(["7", "3", "3"], "3") == [True]
    assert vote(["7", "3", "3", "7", "5"], "7") == [True, False]
    assert vote([None, None, "5"], "7") == [False]
    assert vote([None], "7") == []


def test_all_that_vote_are_the_majority_and_one_is_the_nearest(monkeypatch):
    planted(monkeypatch, spread=3.0)  # clusters that overlap
    rows = problems(12, ("good 7", "bad 3", "good 3", "bad 7", "bad 7"))
    found = scores(rows, best=(1, 5))
    assert found["clue/top-maj-5"] == found["clue/majority"] == 1
    plugin = Clue(best=(1,))
    stack = stack_of(plugin)
    plugin.learn(stack, rows[:6])
    orders = [plugin.rank(stack, row["prompt"], row["samples"]) for row in rows[6:]]
    nearest = [row["samples"][order[0]].endswith("7") for row, order in zip(rows[6:], orders, strict=True)]
    assert sum(nearest) / 6 == found["clue/top-maj-1"]
    assert 0 < sum(nearest) < 6


def test_one_sample_is_its_own_rank_and_vote():
    rows = problems(2) + [{"prompt": "x", "completion": "7", "samples": [f"{a}"]} for a in (7, 3, 3, 7)]
    found = scores(rows, best=(1,), share=1 / 3)
    assert found["clue/top-maj-1"] == found["clue/majority"] == found["clue/mean"] == 0.5
    plugin = Clue()
    stack = stack_of(plugin)
    plugin.learn(stack, rows)
    assert plugin.rank(stack, "x", ["7"]) == [0]


def test_order_of_samples_does_not_matter():
    rows = problems(6, ("good 7", "bad 3", "bad 5", "good 5", "good 7"))
    turned = rows[:3] + [{**row, "samples": row["samples"][::-1]} for row in rows[3:]]
    assert scores(rows, best=(1, 2, 3)) == pytest.approx(scores(turned, best=(1, 2, 3)))
    plugin = Clue()
    stack = stack_of(plugin)
    plugin.learn(stack, rows)
    texts = rows[0]["samples"]
    far = plugin.distances(stack, [plugin.solution("0?", text) for text in texts])[:, 0]
    order = plugin.rank(stack, "0?", texts)
    assert far[order].tolist() == sorted(far.tolist())
    assert [texts[i] for i in order] == [texts[::-1][i] for i in plugin.rank(stack, "0?", texts[::-1])]


def test_ties(monkeypatch):
    """Of the majority half, and of those that are ranked the answer of the nearest."""
    planted(monkeypatch, spread=0.01)
    found = scores(problems(4, ("bad 3", "good 7")), best=(1, 2))
    assert found["clue/majority"] == 0.5
    assert found["clue/top-maj-2"] == 1


def test_an_interval_is_over_problems(monkeypatch):
    planted(monkeypatch)
    stack = stack_of(Clue(**BEST))
    found = stack.evaluate(problems(8), metrics=["clue"])
    assert found["clue/mean"].count == 16
    assert found["clue/mean"].low == found["clue/mean"].high == 0.25  # in each problem the same
    assert found["clue/top-maj-1"].count == 4
    one = stack.evaluate(problems(2), metrics=["clue"])["clue/mean"]
    assert one.low is None


def test_no_score_of_what_there_is_none_of(monkeypatch):
    planted(monkeypatch)
    found = scores([*problems(3), *problems(3, ("bad 3", "bad 4"))])
    assert "clue/verified/right" not in found
    assert found["clue/verified/wrong"] == found["clue/verified"] == 1


# -- rows ----------------------------------------------------------------------------------------------------------


def test_solutions_are_drawn_where_a_row_has_none(monkeypatch):
    asked: list[tuple[list[str], int | None, dict[str, Any]]] = []

    def written(stack: Any, prompts: Any, new: int, seed: int | None, options: Any) -> Any:
        asked.append((prompts, seed, options))
        return [f"{'good 7' if len(asked) % 2 else 'bad 3'}"] * len(prompts), {}

    monkeypatch.setattr(peftx_clue, "generate", written)
    planted(monkeypatch)
    rows = [{"prompt": f"{n}?", "completion": "7"} for n in range(2)]
    options = {"experience_samples": 3, "samples": 4, "batch_size": 2, "seed": 5, "temperature": 0.7}
    found = scores(rows, **options)
    assert [prompts for prompts, _, _ in asked] == [["0?", "0?"], ["0?"], ["1?", "1?"], ["1?", "1?"]]
    assert [seed for _, seed, _ in asked] == [5, 7, 5, 7]
    assert asked[0][2] == {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
    assert found["clue/mean"] == 0.5
    asked.clear()
    scores(rows + problems(2), **options, share=0.5)  # the later ones have theirs
    assert all(prompts[0] in ("0?", "1?") for prompts, _, _ in asked)
    assert sum(len(prompts) for prompts, _, _ in asked) == 6


def test_a_model_draws_several_texts():
    plugin = Clue(max_new_tokens=4, batch_size=2)
    texts = list(plugin._draw(stack_of(plugin), ["1+1?"] * 6))
    assert len(texts) == 6
    assert len(set(texts)) > 3


def test_experience_of_a_file(tmp_path, monkeypatch):
    planted(monkeypatch)
    file = tmp_path / "known.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in problems(3, ("bad 7", "good 3"))), "utf-8")
    found = scores(problems(4), experience=str(file))
    assert found["clue/verified"] == 0  # by the file's own, turned experience
    assert (
        stack_of(Clue(experience=str(file), **BEST))
        .evaluate(problems(4), metrics=["clue"])["clue/mean"]
        .count
        == 16
    )


def test_all_solutions_are_written(tmp_path, monkeypatch):
    planted(monkeypatch)
    plugin = Clue(**BEST)
    stack_of(plugin).evaluate(problems(2), metrics=["clue"], output_dir=tmp_path / "new")
    lines = [json.loads(line) for line in (tmp_path / "new" / "clue.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines] == ["1 good 7", "1 bad 3", "1 bad 3", "1 bad 5"]
    assert [line["right"] for line in lines] == [True, False, False, False]
    assert [line["answer"] for line in lines] == ["7", "3", "3", "5"]
    assert lines[0]["distances"][0] < lines[0]["distances"][1]
    assert lines[1]["distances"][0] > lines[1]["distances"][1]


def test_answers():
    assert Clue().solution("?", "<think>9</think>so 1,200.0").answer == "1200"
    assert Clue().solution("?", "<think>9").answer is None
    whole = Clue(answer="whole")
    assert whole.solution("?", "<think>9</think>\n Yes  it is ").answer == "yes it is"
    assert whole.solution("?", "<think>9</think>").answer is None


def test_chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}<think>"
    stack = Stack(model(), [Clue(chat=True)], tokenizer=tokenizer)
    (problem,) = stack.plugins["clue"]._problems(stack, problems(1), 1)  # type: ignore[attr-defined]
    assert problem.prompt == "[0?]<think>"
    assert problem.solutions[0].before == "[0?]<think>"


def test_rows_that_are_no_problems():
    for rows in ([], problems(1), ["a", "b"]):
        with pytest.raises(DataError, match=r"clue: \d rows to learn from") as error:
            scores(rows)
        assert "`experience`" in str(error.value.hint)
    with pytest.raises(DataError, match=r"clue: row 1 .*: no answer in the completion 'many'"):
        scores([problems(1)[0], {**problems(1)[0], "completion": "many"}, *problems(2)])
    with pytest.raises(DataError, match="a problem has 4 solutions, and `best` asks for 5"):
        scores(problems(), best=(5,))
    assert "clue/top-maj-4" in scores(problems(), best=(4,))
    for answers, said in ((("7", "7"), "6 right and 0 wrong"), (("3",), "0 right and 3 wrong")):
        with pytest.raises(DataError, match=f"clue: {said}"):
            scores([*problems(3, answers), *problems(3)])
    with pytest.raises(DataError, match=r"clue: a solution has \d+ tokens .* the model reads 128"):
        scores(problems(4, ("x" * 300 + " 7", "3")))


@pytest.mark.parametrize("arch", ["bert", "t5"])
def test_models_that_do_not_go_on_from_a_problem(arch):
    with pytest.raises(ArchitectureError, match=r"clue: .* is no decoder"):
        stack_of(Clue(), arch=arch)


def test_several_states_of_a_token():
    with pytest.raises(ArchitectureError, match="clue: Gemma3nForCausalLM has several hidden states"):
        stack_of(Clue(), arch="gemma3n")


@pytest.mark.parametrize(
    "options",
    [
        {"best": ()}, {"best": (0,)}, {"best": (2, 2)}, {"marks": ("", "x")}, {"share": 1.0}, {"temperature": 0},
        {"top_p": 0}, {"samples": 0}, {"per_class": 0},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(PluginError, match=f"Clue: {next(iter(options))}"):
        Clue(**options)


def test_defaults_are_the_papers():
    config = ClueConfig()
    assert (config.samples, config.experience_samples, config.per_class) == (64, 32, 10000)
    assert config.marks == MARKS
    assert math.isclose(config.share, 0.5)
