"""Workers: answers kept by what was asked, counted, gone on with; and second models beside a stack's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftx
from peftx import Stack, Worker, companion
from peftx.engines.data import Lazy
from peftx.errors import BundleError, DataError, PeftxError, UnsupportedError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.serving.server import Server
from peftx.toolkits.working import Budget, OfStack, Recorded, Scripted, kept, kept_file
from peftx.toolkits.working import worker as working
from peftx.toolkits.working.remote import Remote
from peftx_lora import Lora


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str | None:
        asked.append(prompt)
        return None if "bomb" in prompt else f"about {prompt}"

    file = tmp_path / "deep" / "answers.jsonl"
    worker = Worker(Scripted(answer), transcript=file)
    texts = [a.text for a in worker.write(["tea", "rain", "tea", "a bomb"])]
    assert texts == ["about tea", "about rain", "about tea", ""]
    assert asked == ["tea", "rain", "a bomb"]
    assert (worker.budget.spent_calls, worker.budget.refusals) == (3, 1)
    again = Worker(Scripted(answer), transcript=file)
    assert [a.text for a in again.write(["rain", "snow"])] == ["about rain", "about snow"]
    assert asked[3:] == ["snow"], "of another process, what was answered is known"
    assert again.budget.known == 1
    again.write(["rain"], temperature=0.7)
    assert asked[4:] == ["rain"], "another question"
    other = Worker(Scripted(lambda prompt: "mine", name="other"), transcript=file)
    assert other.write(["rain"])[0].text == "mine", "another one's answers are not taken for its own"


def test_a_killed_worker_goes_on(tmp_path: Path) -> None:
    file, count = tmp_path / "answers.jsonl", 0

    def dies(prompt: str) -> str:
        nonlocal count
        count += 1
        if count == 70:
            raise KeyboardInterrupt
        return prompt.upper()

    prompts = [f"question {n}" for n in range(100)]
    with pytest.raises(KeyboardInterrupt):
        Worker(Scripted(dies), transcript=file).write(prompts)
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"key": "abc", "te')
    worker = Worker(Scripted(dies), transcript=file)
    assert [a.text for a in worker.write(prompts)] == [p.upper() for p in prompts]
    assert worker.budget.known == 64, "all but the chunk in which it died"
    assert all(json.loads(line) for line in file.read_text("utf-8").splitlines())
    file.write_bytes(file.read_bytes()[:-1])  # killed between a line and its end
    worker = Worker(Scripted(dies), transcript=file)
    worker.write([prompts[-1], "one more"])
    assert worker.budget.spent_calls == 2
    lines = file.read_text("utf-8").splitlines()
    assert all(json.loads(line) for line in lines)
    file.write_text("\n".join([lines[0], "no answer", lines[1]]) + "\n", "utf-8")
    with pytest.raises(BundleError, match="line 2: no answer of a worker"):
        Worker(Scripted(dies), transcript=file)


def test_a_killed_worker_without_a_transcript_goes_on_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, one of them killed in the middle of a line: nothing that was written whole is asked again."""
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))
    stack, asked = Stack(tiny("llama"), tokenizer=tiny_tokenizer()), 0

    def answer(prompt: str) -> str:
        nonlocal asked
        asked += 1
        return prompt.upper()

    def worker(name: str = "one", **options: Any) -> Worker:
        by = Scripted(answer, name=name)
        return Worker(by, cache=kept_file(by.name, stack), **options)

    prompts = [f"question {n}" for n in range(50)]
    first, other = worker(), worker()
    first.write(prompts[:40])
    (file,) = (tmp_path / "answers").glob("*")
    with file.open("a", encoding="utf-8") as torn:
        torn.write('\n{"key": "abc", "te')
    other.write(prompts[40:])
    assert "question" not in file.read_text("utf-8"), "of answers alone"
    again = worker()
    assert [a.text for a in again.write(prompts)] == [p.upper() for p in prompts]
    assert (asked, again.budget.known) == (50, 50)
    assert [a.text for a in worker("two").write(["question 1"])] == ["QUESTION 1"]
    assert asked == 51, "another one's answers"
    worker(transcript=tmp_path / "own.jsonl").write(["question 1"])
    assert asked == 52, "who names a file has that file alone"
    monkeypatch.setattr(kept, "__version__", "9.9")
    worker().write(["question 1"])
    assert asked == 53, "another version"
    monkeypatch.setenv("PEFTX_CACHE", "")
    worker().write(["question 1"])
    assert asked == 54, "nothing is kept"
    assert len([*(tmp_path / "answers").glob("*")]) == 3


def test_a_cache_that_is_full_keeps_what_came_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", most := 500)
    for name in ("a", "b", "c"):
        by = Scripted(str.upper, name=name)
        Worker(by, cache=tmp_path / f"{name}.jsonl").write(["one"])
        os.utime(tmp_path / f"{name}.jsonl", (ord(name), ord(name)))
    Worker(by, cache=tmp_path / "c.jsonl").write(["two", "three"])
    assert sorted(file.stem for file in tmp_path.glob("*")) == ["b", "c"]
    assert sum(file.stat().st_size for file in tmp_path.glob("*")) <= most


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    worker = Worker(Scripted(str.upper), cache=tmp_path / "file" / "answers.jsonl")
    assert worker.write(["one"])[0].text == "ONE"


def test_a_budget_ends_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    file, prompts = tmp_path / "a.jsonl", [f"q{n}" for n in range(40)]
    worker = Worker(Scripted(str.upper), transcript=file, budget=Budget(calls=35))
    with pytest.raises(PeftxError, match="asked 32 times, and 8 more are over its budget of 35"):
        worker.write(prompts)
    larger = Worker(Scripted(str.upper), transcript=file, budget=Budget(calls=35))
    assert len(larger.write(prompts)) == 40
    assert larger.budget.spent_calls == 8
    spent = Worker(Scripted(str.upper), budget=Budget(tokens=30))
    spent.write(prompts[:32])
    with pytest.raises(PeftxError, match="has used 32 of 30 tokens"):
        spent.write(["one more"])


def test_choosing() -> None:
    rules = Worker(Scripted(lambda prompt: "I think Bad, not good" if "rain" in prompt else "dunno"))
    assert rules.choose(["rain", "sun"], ["good", "bad"]) == ["bad", "good"]
    with pytest.raises(DataError, match="1 labels leave nothing to choose"):
        rules.choose(["rain"], ["good"])
    with pytest.raises(UnsupportedError, match="gives no probabilities"):
        rules.score([("a", "b")])


def test_a_stack_writes_scores_and_chooses(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    worker = Worker(OfStack(stack), transcript=tmp_path / "a.jsonl")
    found = worker.write(["User: tea?\nAssistant:", "Hello"], max_new_tokens=6)
    assert [a.text for a in found] == stack.generate(
        ["User: tea?\nAssistant:", "Hello"], max_new_tokens=6, do_sample=False
    )
    assert worker.budget.spent_tokens > 12
    pairs = [("The sky is", " blue"), ("The sky is", " zqx")]
    scores = worker.score(pairs)
    assert scores[0] > scores[1]
    assert worker.choose(["The sky is"], [" zqx", " blue"]) == [" blue"]
    assert Worker(OfStack(stack), transcript=tmp_path / "a.jsonl").score(pairs) == scores
    stack.trained_steps += 1
    assert OfStack(stack).name != worker.by.name, "a trained stack answers anew"


def test_recorded_answers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    Worker(Scripted(str.upper), transcript=file).write(["tea"])
    assert Worker(Recorded(file)).write(["tea"])[0].text == "TEA"
    assert Worker(Recorded({"rain": "wet"})).write(["rain"])[0].text == "wet"
    with pytest.raises(DataError, match="no answer is recorded for 'snow'"):
        Worker(Recorded(file)).write(["snow"])


@pytest.fixture
def server(listening: Any) -> Iterator[tuple[str, Stack]]:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    with listening(Server(stack, name="tiny")) as url:
        yield f"{url}/v1", stack


def test_a_server_answers(server: tuple[str, Stack]) -> None:
    url, stack = server
    worker = Worker(Remote("tiny", base_url=url, chat=False))
    prompts = ["Hello there", "The sky is"]
    found = worker.write(prompts, max_new_tokens=5)
    assert [a.text for a in found] == stack.generate(prompts, max_new_tokens=5, do_sample=False)
    assert worker.budget.spent_tokens > 10
    with pytest.raises(PeftxError, match=r"remote:http://127.0.0.1:.*NotFoundError"):
        Worker(Remote("large", base_url=url, chat=True, retries=0)).write(["Hello"])
    asked = stack.generate("User: Hello\nAssistant:", max_new_tokens=5, do_sample=False)
    (chat,) = Worker(Remote("tiny", base_url=url, chat=True)).write(["Hello"], max_new_tokens=5)
    assert chat.text == asked.removeprefix(" ")


# -- companions ------------------------------------------------------------------------------------------------------


def test_a_companion_is_another_model_that_nobody_trains(tmp_path: Path) -> None:
    ids = torch.arange(3, 9)[None]
    teacher = Stack("peftx:tiny", [Lora(rank=2)])
    with torch.no_grad():
        for p in teacher.ledger.parameters("lora"):
            p.add_(0.05)
        taught = teacher.model(ids).logits
    folder = teacher.save(tmp_path / "teacher")
    stack = Stack("peftx:tiny", [Lora(rank=4)])
    count = sum(1 for _ in stack.model.parameters())
    for source in (folder, teacher):
        found = companion(stack, source)
        with torch.no_grad():
            assert torch.equal(found(ids).logits, taught)
        assert not found.training
        assert not any(p.requires_grad for p in found.parameters())
    assert sum(1 for _ in stack.model.parameters()) == count, "it is no part of the stack"
    assert companion(stack, folder) is companion(stack, str(folder))
    frozen = companion(stack, "copy")
    with torch.no_grad():
        before = stack.model(ids).logits
        for p in stack.ledger.parameters("lora"):
            p.add_(0.1)
        assert torch.equal(frozen(ids).logits, before)
    assert "lora" in peftx.load(stack.save(tmp_path / "mine")).plugins


def test_a_companion_of_another_vocabulary_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    other = Stack(tiny("llama"), tokenizer=tokenizer)
    with pytest.raises(PeftxError, match="another vocabulary"):
        companion(Stack(tiny("llama"), tokenizer=tiny_tokenizer()), other)


def test_questions_are_looked_at_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, few together, and equal ones are asked once whatever block they are in."""
    monkeypatch.setattr(working, "BLOCK", 4)
    monkeypatch.setattr(working, "AT_ONCE", 3)
    looked, asked, told = list[int](), list[str](), list[tuple[int, int]]()

    def question(i: int) -> str:
        looked.append(i)
        return f"question {i % 7}"

    by = Scripted(lambda prompt: asked.append(prompt) or prompt.upper())
    worker = Worker(by, tmp_path / "a.jsonl", progress=lambda *done: told.append(done))
    texts = [answer.text for answer in worker.write(Lazy(10, question))]
    assert texts == [f"QUESTION {i % 7}" for i in range(10)]
    assert looked == [*range(10)]
    assert asked == [f"question {i}" for i in range(7)]
    assert told == [(3, 10), (4, 10), (8, 10)], "of all questions, those that are known counted"
    assert (worker.budget.spent_calls, worker.budget.known) == (7, 3)
    with pytest.raises(DataError, match=r"prompt 5 \(counting from 0\)"):
        worker.write(Lazy(10, lambda i: None if i == 5 else "x"))


def test_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    Worker(Scripted(str.upper), transcript=file).write(["one\u2028two", "three"])
    again = Worker(Scripted(lambda _: pytest.fail("asked again")), transcript=file)
    assert [a.text for a in again.write(["three", "one\u2028two"])] == ["THREE", "ONE\u2028TWO"]
    assert (
        Recorded(file).write(["one\u2028two"], max_new_tokens=1, temperature=0, seed=0)[0].text
        == "ONE\u2028TWO"
    )
