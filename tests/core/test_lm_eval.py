"""lm-eval as a metric: the library's own numbers, tasks of one's own, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import utils
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LogitsProcessor
from typer.testing import CliRunner

from peftx import Delta, Plugin, Stack, Targets, hookimpl
from peftx.engines import tasks as engine
from peftx.engines.tasks import PACKAGED, find_tasks
from peftx.errors import DataError, PeftxError, SpecError, UnsupportedError
from peftx.pipeline import load_run
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.evaluation import harness
from peftx.toolkits.evaluation.harness import StackLM, _interval, _metric, run_tasks
from peftx.toolkits.evaluation.likelihood import opening_ids
from peftx_cli.main import app
from peftx_lora import Lora

OURS = ["peftx-calendar", "peftx-log", "peftx-opposites"]
PAIRS = [
    ("The harbour was", " quiet"), ("The harbour was ", "quiet and the lamp was lit"), ("", "Once upon a time"),
    ("Wind west, 12 knots.\n", "Sea rough."), ("a", " b"),
]  # fmt: skip


def moved(*plugins: Plugin) -> Stack:
    stack = Stack("peftx:tiny", plugins)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in stack.plugins:
            for parameter in stack.ledger.parameters(name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return stack


@pytest.fixture(scope="module")
def stack() -> Stack:
    return moved(Lora(rank=2))


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def theirs(stack: Stack, **options: Any) -> HFLM:
    """The library's own way to ask a model, one text at a time: it gives models no masks."""
    return HFLM(pretrained=stack.model, tokenizer=copy.deepcopy(stack.tokenizer), batch_size=1, **options)


def task(folder: Path, name: str = "mine", **more: Any) -> Path:
    """A task of four questions; the file's path."""
    folder.mkdir(exist_ok=True)
    rows = [{"q": f"{n} and {n} is", "a": [" more", " zqx"], "right": 1} for n in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "a",
        "doc_to_target": "right", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config | more), "utf-8")  # JSON is YAML
    return file


# ---------------------------------------------------------------------------------------- the library's own numbers
def test_likelihoods_are_the_librarys(stack: Stack) -> None:
    ours, hf = StackLM(stack), theirs(stack)
    found, wanted = ours.loglikelihood(asked(*PAIRS)), hf.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-4)
    best = stack.generate("The harbour was", max_new_tokens=2, do_sample=False)
    assert ours.loglikelihood(asked(("The harbour was", best)))[0][1]


def test_rolling_likelihoods_are_the_librarys(stack: Stack) -> None:
    texts = asked(("The lamp was lit at six in the evening, and the wind blew from the west.",), ("Yes.",))
    wanted = theirs(stack, add_bos_token=False, max_length=9).loglikelihood_rolling(texts, disable_tqdm=True)
    found = StackLM(stack, max_length=9).loglikelihood_rolling(texts)
    assert found == pytest.approx(wanted, abs=1e-3)


def test_answers_are_the_librarys(stack: Stack) -> None:
    options = {"until": ["\n", "."], "max_gen_toks": 8}
    questions = asked(
        ("Once upon a time", options), ("The harbour", options), ("He", {**options, "until": "e"})
    )
    found = StackLM(stack).generate_until(questions)
    assert found == theirs(stack).generate_until(questions, disable_tqdm=True)
    assert any(found)
    long = asked((40 * "The harbour was quiet. ", {"until": [], "max_gen_toks": 6, "temperature": 0.0}))
    found = StackLM(stack, max_length=20).generate_until(long)  # what does not fit is cut at its left
    assert found == theirs(stack, max_length=20).generate_until(long, disable_tqdm=True)
    assert found != StackLM(stack).generate_until(long)
    with pytest.raises(DataError, match="may have 6 tokens, and 6 fit"):
        StackLM(stack, max_length=6).generate_until(long)


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_the_librarys(stack: Stack, shots: int, tmp_path: Path) -> None:
    """With the library's own loader, on the files as they are shipped."""
    configs = []
    for name in ("log", "opposites", "calendar"):
        text = (
            (PACKAGED / f"{name}.yaml")
            .read_text("utf-8")
            .replace(f"{name}.jsonl", str(PACKAGED / f"{name}.jsonl"))
        )
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
        configs.append(str(tmp_path / f"{name}.yaml"))
    loaded = TaskManager(include_defaults=False).load(configs)
    for each in loaded["tasks"].values():
        each.set_config(key="num_fewshot", value=shots)
        each.set_fewshot_seed(seed=1234)
    told = evaluate(theirs(stack), loaded, limit=6, bootstrap_iters=0)["results"]
    found = run_tasks(stack, OURS, num_fewshot=shots, limit=6)
    assert {name: score.value for name, score in found.items()} == {
        "acc/peftx-log": told["peftx-log"]["acc,none"],
        "acc/peftx-opposites": told["peftx-opposites"]["acc,none"],
        "exact_match/peftx-calendar": told["peftx-calendar"]["exact_match,none"],
    }
    assert {score.count for score in found.values()} == {6}


class Counting(Plugin):
    """Shifts what a layer gives by the number of a row's real tokens."""

    @hookimpl
    def inject(self, model: Any) -> None:
        call = model.call

        class Shift(Delta):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return y + 0.1 * call.real.sum(-1)[:, None, None]

        model.linears(Targets("attention.v"))[0].attach(Shift())


def test_padding_reaches_no_plugin() -> None:
    stack = Stack("peftx:tiny", [Counting()])
    together = StackLM(stack).loglikelihood(asked(*PAIRS))
    alone = [StackLM(stack).loglikelihood(asked(pair))[0] for pair in PAIRS]
    assert [log for log, _ in together] == pytest.approx([log for log, _ in alone], abs=1e-4)


class Shouting(Plugin):
    """Writes one token for ever."""

    @hookimpl(wrapper=True)
    def decode(self, request: Any) -> Any:
        request.logits_processors.append(OneWord())
        return (yield)


class OneWord(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(scores).index_fill(1, torch.tensor([500]), 1.0)


def test_decode_hooks_are_in_the_answers() -> None:
    stack = Stack("peftx:tiny", [Shouting()])
    answer = StackLM(stack).generate_until(asked(("Once", {"until": [], "max_gen_toks": 3})))
    assert answer == [stack.tokenizer.decode([500, 500, 500])]


def test_dropout_is_off_and_greedy_answers_have_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = moved(Lora(rank=4, dropout=0.9))
    stack.model.train()
    given: list[dict[str, Any]] = []
    plain = harness.request_of_ids

    def noted(of: Stack, rows: Any, new: int, seed: int | None, options: dict[str, Any]) -> Any:
        given.append(options)
        assert not stack.model.training
        return plain(of, rows, new, seed, options)

    monkeypatch.setattr(harness, "request_of_ids", noted)
    run_tasks(stack, ["peftx-calendar"], limit=2)
    assert [options.keys() for options in given] == [{"do_sample", "stop_strings"}] * 2


def test_an_encoder_decoder() -> None:
    stack = Stack(tiny("t5"), [], tokenizer=tiny_tokenizer())
    found = run_tasks(stack, ["peftx-opposites"], limit=4, max_length=64)
    assert found["acc/peftx-opposites"].count == 4
    ours, hf = StackLM(stack, max_length=64), theirs(stack, max_length=64, backend="seq2seq")
    pairs = asked(("The harbour was", "quiet"), ("a b c", "d e"))
    wanted = [log for log, _ in hf.loglikelihood(pairs, disable_tqdm=True)]
    assert [log for log, _ in ours.loglikelihood(pairs)] == pytest.approx(wanted, abs=1e-4)


def test_a_masked_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="predicts masked tokens"):
        run_tasks(Stack(tiny("bert"), [], tokenizer=tiny_tokenizer()), ["peftx-log"])


def test_an_answer_that_melts_into_its_question_is_refused(stack: Stack) -> None:
    with pytest.raises(DataError, match="an answer has 0 tokens"):
        StackLM(stack).loglikelihood(asked(("a", "b")))


def test_intervals() -> None:
    low, high = _interval(0.75, [1, 1, 1, 0]) or (0, 0)
    assert (low, high) == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson's, by hand
    low, high = _interval(0.5, [0.2, 0.8, 0.4, 0.6]) or (0, 0)
    assert 0.2 <= low < 0.5 < high <= 0.8
    assert _interval(7.0, [0.2, 0.8]) is None  # no mean
    assert _interval(1.0, [(0.5, 2), (1.5, 3)]) is None


def test_what_it_leaves_as_it_was(stack: Stack, tmp_path: Path) -> None:
    stack.model.train()
    template, state, tokenizer = utils.env, torch.get_rng_state(), stack.tokenizer.pad_token
    run_tasks(stack, ["peftx-calendar", "peftx-log"], limit=2, num_fewshot=1)
    task(tmp_path, doc_to_text="{{nothing}}")
    with pytest.raises(DataError, match="'nothing' is undefined"):
        run_tasks(stack, ["mine"], include=tmp_path)
    assert utils.env is template
    assert torch.equal(torch.get_rng_state(), state)
    assert stack.model.training
    assert stack.tokenizer.pad_token == tokenizer


# --------------------------------------------------------------------------------------------------- one's own tasks
def test_a_task_of_ones_own(stack: Stack, tmp_path: Path) -> None:
    task(tmp_path / "tasks")
    (tmp_path / "tasks/base.yaml").write_text("doc_to_text: 'Say: {{q}}'\ntarget_delimiter: ' '\n", "utf-8")
    (tmp_path / "tasks/deep").mkdir()
    task(tmp_path / "tasks/deep", "other", include="../base.yaml")
    found = stack.evaluate(metrics=["lm-eval"], tasks=["mine", "other"], include=str(tmp_path / "tasks"))
    assert set(found) == {"acc/mine", "acc/other"}
    assert stack.scores["acc/mine"].count == 4
    assert (
        engine.read_task(tmp_path / "tasks/deep/other.yaml")["doc_to_text"] == "{{q}}"
    )  # what it says itself


REFUSED = [
    ({"doc_to_text": "!function utils.run"}, "would run code: !function utils.run"),
    ({"metric_list": [{"metric": "acc", "aggregation": "!function utils.run"}]}, "would run code"),
    ({"class": "!function utils.Task"}, "would run code"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "would run code: hf_evaluate"),
    ({"custom_dataset": "x"}, "says 'custom_dataset', which peftx does not read"),
    ({"use_prompt": "promptsource:x"}, "says 'use_prompt'"),
    ({"unsafe_code": True}, "says 'unsafe_code'"),
    ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "there is no file"),
]


@pytest.mark.parametrize(("change", "wanted"), REFUSED)
def test_code_of_strangers_does_not_run(
    stack: Stack, tmp_path: Path, change: dict[str, Any], wanted: str
) -> None:
    file = task(tmp_path, **change)
    text = file.read_text("utf-8")
    for name in ("utils.run", "utils.Task"):  # a tag is no JSON
        text = text.replace(f'"!function {name}"', f"!function {name}")
    file.write_text(text, "utf-8")
    (tmp_path / "utils.py").write_text("raise SystemExit('it ran')", "utf-8")
    with pytest.raises(DataError, match=wanted):
        find_tasks(["mine"], tmp_path)
    with pytest.raises(DataError, match=wanted):
        stack.evaluate(metrics=["lm-eval"], tasks=["mine"], include=tmp_path)


def test_templates_reach_no_python(stack: Stack, tmp_path: Path) -> None:
    task(tmp_path, doc_to_text="{{ q.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="SecurityError"):
        run_tasks(stack, ["mine"], include=tmp_path)


def test_metrics_of_the_hub_are_refused(stack: Stack, tmp_path: Path) -> None:
    task(tmp_path, metric_list=[{"metric": "acy"}])
    with pytest.raises(DataError, match="no metric 'acy', and would run one of the Hub"):
        run_tasks(stack, ["mine"], include=tmp_path)
    with pytest.raises(DataError, match="would run one of the Hub"):  # as some of the library's own tasks ask
        _metric("acc", hf_evaluate_metric=True)
    assert callable(_metric("acc"))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task 'peftx-lgo'") as caught:
        find_tasks(["peftx-lgo"])
    assert "did you mean 'peftx-log'" in str(caught.value)
    with pytest.raises(DataError, match="no folder of tasks"):
        find_tasks(["mine"], tmp_path / "none")
    file = task(tmp_path)
    task(tmp_path, "peftx-log")
    with pytest.raises(DataError, match="a packaged task 'peftx-log' already"):
        find_tasks(["mine"], tmp_path)
    (tmp_path / "peftx-log.yaml").write_text(file.read_text("utf-8"), "utf-8")
    with pytest.raises(DataError, match="has a task 'mine' too"):
        find_tasks(["mine"], tmp_path)
    for text, wanted in (
        (": [", "is no task: "),
        ("- a", "holds no mapping"),
        ("include: mine.yaml", "includes itself"),
    ):
        (tmp_path / "peftx-log.yaml").unlink(missing_ok=True)
        file.write_text(text, "utf-8")
        with pytest.raises(DataError, match=wanted):
            find_tasks(["mine"], tmp_path)


def test_rows_of_the_hub_need_it(stack: Stack, tmp_path: Path) -> None:
    task(tmp_path, dataset_path="owner/questions", dataset_kwargs={})
    with pytest.raises(DataError, match="owner/questions") as caught:
        run_tasks(stack, ["mine"], include=tmp_path)
    assert "the rows of 'mine' come from the Hub" in str(caught.value)


def test_the_librarys_tasks_need_the_hub(stack: Stack) -> None:
    (found,) = find_tasks(["arc_easy"])
    assert found.config is None
    with pytest.raises(DataError, match="arc_easy cannot be run") as caught:
        run_tasks(stack, ["arc_easy"], limit=1)
    assert "the rows of 'arc_easy' come from the Hub" in str(caught.value)


class Failing(Plugin):
    @hookimpl
    def inject(self, model: Any) -> None:
        class Broken(Delta):
            def forward(self, x: Any, y: Any) -> Any:
                raise ValueError("the plugin's own")

        model.linears(Targets("attention.q"))[0].attach(Broken())


def test_what_a_plugin_raises_is_no_tasks_fault() -> None:
    with pytest.raises(ValueError, match="the plugin's own") as caught:
        run_tasks(Stack("peftx:tiny", [Failing()]), ["peftx-log"], limit=1)
    assert not isinstance(caught.value, PeftxError)


# ----------------------------------------------------------------------------------------------- specs and commands
SPEC = """peftx: 1
model: peftx:tiny
stack: [{use: lora, with: {rank: 4}}]
data: {train: train.jsonl}
train: {steps: 10, batch_size: 4, learning_rate: 1e-2}
evaluate: [{lm-eval: {tasks: [peftx-log, mine], include: tasks, limit: 8}}]
run: [{evaluate: {name: base}}, inject, train, {evaluate: {name: adapted}}, save]
output: out
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    task(tmp_path / "tasks")
    rows = [{"prompt": f"{n} and {n} is", "completion": " zqx"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "spec.yaml").write_text(SPEC, "utf-8")
    return tmp_path / "spec.yaml"


def test_in_a_run(spec: Path) -> None:
    result = CliRunner().invoke(app, ["apply", "spec.yaml", "--json"])
    assert result.exit_code == 0, result.stderr
    scores = json.loads(result.stdout)["scores"]
    assert scores.keys() == {"base", "adapted"}
    assert scores["base"].keys() == {"acc/peftx-log", "acc/mine"}
    assert (scores["base"]["acc/mine"]["value"], scores["adapted"]["acc/mine"]["value"]) == (0.0, 1.0)
    assert scores["base"]["acc/peftx-log"]["count"] == 8
    again = CliRunner().invoke(app, ["validate", "out/pipeline.yaml"])  # with every default written out
    assert again.exit_code == 0, again.stderr
    shown = CliRunner().invoke(app, ["evaluate", "out", "--task", "peftx-log", "--limit", "8"])
    assert shown.exit_code == 0, shown.stderr
    assert "acc/peftx-log" in shown.stdout
    assert f"{scores['adapted']['acc/peftx-log']['value']:.6g}" in shown.stdout


@pytest.mark.parametrize(
    ("old", "new", "place", "wanted"),
    [
        ("peftx-log,", "peftx-lgo,", "evaluate[0].lm-eval.tasks[0]", "did you mean 'peftx-log'"),
        ("include: tasks", "include: taks", "evaluate[0].lm-eval.tasks[0]", "no folder of tasks"),
        ("tasks: [peftx-log, mine], ", "", "evaluate[0].lm-eval", "runs tasks, and none is named"),
        ("include: tasks", "path: tasks", "evaluate[0].lm-eval.path", "a folder of tasks is 'include'"),
        ("include: tasks", "format: text", "evaluate[0].lm-eval.format", "'format' is of rows"),
        ("lm-eval: {", "perplexity: {path: train.jsonl, ", "evaluate[0].perplexity.tasks", "is of lm-eval"),
    ],
)  # fmt: skip
def test_mistakes_have_their_place(spec: Path, old: str, new: str, place: str, wanted: str) -> None:
    assert old in SPEC
    spec.write_text(SPEC.replace(old, new), "utf-8")
    result = CliRunner().invoke(app, ["validate", "spec.yaml"])
    assert result.exit_code == 2
    assert f"at: {place}\n" in result.stderr
    assert wanted in result.stderr
    with pytest.raises((SpecError, DataError)):
        load_run(spec)


def test_a_comparison_refuses_it(tmp_path: Path) -> None:
    text = (
        "peftx: 1\ncompare:\n  base: {model: peftx:tiny, data: {train: peftx:sample/train.jsonl, holdout: 0.1},\n"
        "    evaluate: [perplexity, {lm-eval: {tasks: [peftx-log]}}]}\n"
        "  budget: {steps: 1}\n  seeds: [0]\n  learning_rate: [1e-3]\n  methods: {lora: {stack: [lora]}}\n"
    )
    (tmp_path / "compare.yaml").write_text(text, "utf-8")
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "compare.yaml")])
    assert result.exit_code == 2
    assert "'lm-eval' has rows of its own" in result.stderr


def test_on_the_command_line(spec: Path) -> None:
    for words, wanted in (
        (["evaluate", "peftx:tiny", "--metric", "lm-eval"], "--task names them"),
        (["evaluate", "peftx:tiny", "--metric", "perplexity", "--task", "mine"], "--task names them"),
        (["evaluate", "peftx:tiny", "--include", "tasks"], "--task names none"),
        (["evaluate", "peftx:tiny", "--task", "peftx-lgo"], "did you mean 'peftx-log'"),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, result.stdout
        assert wanted in result.stderr
    result = CliRunner().invoke(
        app, ["evaluate", "peftx:tiny", "--task", "mine", "--include", "tasks", "--json"]
    )
    assert json.loads(result.stdout)["acc/mine"]["count"] == 4


def test_without_the_extra(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["validate", "spec.yaml"])
    assert result.exit_code == 2
    assert result.stderr.count("lm-eval needs lm_eval, which is not installed") == 1
    assert "pip install 'peftx[eval]'" in result.stderr
    with pytest.raises(UnsupportedError, match="lm_eval, which is not installed"):
        Stack("peftx:tiny", []).evaluate(metrics=["lm-eval"], tasks=["peftx-log"])


def test_validate_imports_neither_torch_nor_the_library(spec: Path) -> None:
    code = (
        "import sys; from peftx_cli.main import app; from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['validate', 'spec.yaml']); assert result.exit_code == 0, result.stderr\n"
        "assert not {'torch', 'lm_eval'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packaged_tasks_are_small() -> None:
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 12_000
    assert [found.name for found in find_tasks(OURS)] == OURS
    assert find_spec("lm_eval") is not None
    assert opening_ids(Stack("peftx:tiny", []).tokenizer) == [0]
