"""Every kind of mistake, with the character that is blamed marked in the text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peftx_spec import Problem

HEAD = "peftx: 1\nmodel: m\n"  # two lines, so that what a case adds starts on line 3
DATA = "data: {train: t.jsonl, eval: e.jsonl}\n"  # line 3
TRAINED = "stack: [lora]\n" + DATA
HELD_OUT = "data: {eval: e.jsonl}\n"
MARK = "▸"  # stands before the character that is blamed

# text, path, and words that the rendering holds
CASES: list[tuple[str, str, list[str]]] = [
    (
        HEAD
        + TRAINED
        + "train: {}\nrun: [inject, {repeat: {times: 2, run: [{train: {plugins: [▸lroa]}}]}}]\n",
        "run[1].repeat.run[0].train.plugins[0]",
        ["'train' lists 'lroa', which is not in the stack", "did you mean 'lora'?"],
    ),
    (
        HEAD + TRAINED + "train: {}\nrun: [inject, {repeat: {times: 2, run: [train, {▸drop: lora}]}}]\n",
        "run[1].repeat.run[1].drop",
        ["finds nothing to remove in the second round"],
    ),
    (
        HEAD + TRAINED + "train: {}\nrun: [inject, {repeat: {times: ▸0, run: [train]}}]\n",
        "run[1].repeat.times",
        ["got: the number 0"],
    ),
    (
        HEAD + "stack: [lora]\ndata: {sources: {news: n}}\n"
        "train: {}\nrun: [inject, {repeat: {over: [news, ▸new], run: [train]}}]\n",
        "run[1].repeat.over[1]",
        ["'over' names 'new', which is not in data.sources", "a source (news)", "did you mean 'news'?"],
    ),
    (
        HEAD + TRAINED + "train: {learning_rates: {▸lroa: 0.1}}\n",
        "train.learning_rates.lroa",
        ["'learning_rates' names 'lroa', which is not in the stack", "did you mean 'lora'?"],
    ),
    (
        HEAD
        + TRAINED
        + "train: {}\nrun: [inject, {repeat: {times: 2, run: [{train: {learning_rates: {▸a: 1}}}]}}]\n",
        "run[1].repeat.run[0].train.learning_rates.a",
        ["'learning_rates' names 'a', which is not in the stack"],
    ),
    (
        HEAD
        + "stack: [lora, {use: mosaic-it, with: {keep: 0.5}}]\n"
        + DATA
        + "train: {learning_rates: {▸mosaic-it: 0.1}}\n",
        "train.learning_rates.mosaic-it",
        ["'mosaic-it' injects nothing that could train"],
    ),
    ("▸model: m\n", "peftx", ["missing key: 'peftx'"]),
    ("▸peftx: 1\n", "model", ["missing key: 'model'", "the base model"]),
    ("peftx: ▸2\nmodel: m\n", "peftx", ["reads specs of format 1", "got: the number 2"]),
    ("peftx: ▸true\nmodel: m\n", "peftx", ["expected: 1", "got: true"]),
    ("peftx: ▸'1'\nmodel: m\n", "peftx", ["expected: 1", "got: the text '1'"]),
    ("peftx: 1\nmodel: ▸''\n", "model", ["expected: text, not empty"]),
    ("peftx: 1\nmodel:▸\n", "model", ["expected: a mapping", "got: nothing"]),
    ("peftx: 1\nmodel: {id: ▸3}\n", "model.id", ["expected: text", "got: the number 3"]),
    ("peftx: 1\n▸model: {dtype: float32}\n", "model.id", ["missing key: 'id'"]),
    (
        "peftx: 1\nmodel: {id: m, dtype: ▸fp16}\n",
        "model.dtype",
        ["'bfloat16', 'float16'", "got: the text 'fp16'"],
    ),
    ("peftx: 1\nmodel: {id: m, dtype: ▸flaot32}\n", "model.dtype", ["did you mean 'float32'"]),
    ("peftx: 1\nmodel: {id: m, device: ▸gpu}\n", "model.device", ["text that matches", "cuda"]),
    *(
        (
            f"peftx: 1\nmodel: {{id: m, ▸trust_remote_code: {value}}}\n",
            "model.trust_remote_code",
            ["not a spec's to set", "--trust-remote-code"],
        )
        for value in ("true", "false", "yes", "1", "'${env:HOME}'", "[true]")
    ),
    (HEAD + "▸stak: []\n", "stak", ["unknown key: 'stak'", "did you mean 'stack'?"]),
    (HEAD + "▸zzz: []\n", "zzz", ["expected: one of peftx, model, data, stack"]),
    (HEAD + "data: ▸x\n", "data", ["expected: a mapping", "got: the text 'x'"]),
    (HEAD + "data: {▸trian: x}\n", "data.trian", ["did you mean 'train'?"]),
    (
        HEAD + "stack: [lora]\ntrain: {}\ndata:\n  ▸train: {format: text}\n",
        "data.train.path",
        ["missing key: 'path'"],
    ),
    (
        HEAD + "data: {eval: {path: x, limit: ▸0}}\n",
        "data.eval.limit",
        ["a number of at least 1", "got: the number 0"],
    ),
    (HEAD + "data: {eval: {path: x, format: ▸chat}}\n", "data.eval.format", ["'messages'"]),
    (HEAD + "data: {eval: {path: x, columns: {a: ▸1}}}\n", "data.eval.columns.a", ["expected: text"]),
    (HEAD + "data: {▸calibration: }\n", "data.calibration", ["'calibration' has no value"]),
    (HEAD + "stack: ▸{lora: {rank: 8}}\n", "stack", ["expected: a list", "a mapping with the keys lora"]),
    (HEAD + "stack: [▸3]\n", "stack[0]", ["expected: a mapping", "got: the number 3"]),
    (
        HEAD + "stack:\n  - ▸lroa\n",
        "stack[0].use",
        ["no plugin 'lroa'", "did you mean 'lora'", "Otherwise: install 'lroa' from"],
    ),
    (HEAD + "stack:\n  - use: ▸zzz\n", "stack[0].use", ["install 'zzz' from"]),
    (HEAD + "stack:\n  - use: ▸3\n", "stack[0].use", ["expected: text"]),
    (
        HEAD + "stack:\n  - ▸broken\n",
        "stack[0].use",
        ["does not import: no module named 'gone'", "reinstall it"],
    ),
    (HEAD + "stack:\n  - {use: lora, ▸wiht: {}}\n", "stack[0].wiht", ["did you mean 'with'?"]),
    (HEAD + "stack:\n  - {use: lora, ▸rank: 8}\n", "stack[0].rank", ["options stand under 'with:'"]),
    (HEAD + "stack:\n  - {use: lora, ▸options: {}}\n", "stack[0].options", ["unknown key: 'options'"]),
    (
        HEAD + "stack:\n  - {use: lora, with: ▸8}\n",
        "stack[0].with",
        ["expected: a mapping", "got: the number 8"],
    ),
    (HEAD + "stack:\n  - {use: lora, id: ▸Big}\n", "stack[0].id", ["small letters, digits and hyphens"]),
    (HEAD + "stack:\n  - {use: lora, id: ▸train}\n", "stack[0].id", ["a word of the spec"]),
    (HEAD + "stack:\n  - {use: lora, id: ▸all}\n", "stack[0].id", ["a word of the spec"]),
    (
        HEAD + "stack:\n  - lora\n  - use: ▸lora\n",
        "stack[1].use",
        ["stands twice: first at stack[0]", "add an 'id:'", "lora-2"],
    ),
    (HEAD + "stack:\n  - lora\n  - {use: lora, id: ▸lora}\n", "stack[1].id", ["the id 'lora' stands twice"]),
    (
        HEAD + "stack:\n  - {use: prefixquant, phase: ▸later}\n",
        "stack[0].phase",
        ["'before-training' or 'after-training'"],
    ),
    (HEAD + "stack:\n  - {use: lora, ▸phase: after-training}\n", "stack[0].phase", ["'lora' does not"]),
    (
        HEAD + "stack:\n  - {use: lora, with: {▸rnk: 8}}\n",
        "stack[0].with.rnk",
        ["unknown option of 'lora': 'rnk'", "did you mean 'rank'"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {▸zzz: 8}}\n",
        "stack[0].with.zzz",
        ["expected: one of rank, alpha, dropout"],
    ),
    (
        HEAD + "stack:\n  - {use: language-ranker, with: {▸zzz: 8}}\n",
        "stack[0].with.zzz",
        ["no option of 'language-ranker' at all"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {rank: ▸x}}\n",
        "stack[0].with.rank",
        ["expected: a whole number", "got: the text 'x'"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {rank: ▸'8'}}\n",
        "stack[0].with.rank",
        ["a whole number", "got: the text '8'"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {rank: ▸true}}\n",
        "stack[0].with.rank",
        ["a whole number", "got: true"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {rank: ▸1.5}}\n",
        "stack[0].with.rank",
        ["a whole number", "got: the number 1.5"],
    ),
    (HEAD + "stack:\n  - {use: lora, with: {rank: ▸0}}\n", "stack[0].with.rank", ["a number of at least 1"]),
    (
        HEAD + "stack:\n  - {use: lora, with: {alpha: ▸0}}\n",
        "stack[0].with.alpha",
        ["a number greater than 0"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {dropout: ▸1}}\n",
        "stack[0].with.dropout",
        ["a number less than 1"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {use_bias: ▸off}}\n",
        "stack[0].with.use_bias",
        ["true or false", "write false"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {use_bias: ▸1}}\n",
        "stack[0].with.use_bias",
        ["true or false", "got: the number 1"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {layers: [1, ▸x]}}\n",
        "stack[0].with.layers[1]",
        ["an item of 'layers'"],
    ),
    (HEAD + "stack:\n  - {use: lora, with: {layers: ▸1}}\n", "stack[0].with.layers", ["expected: a list"]),
    (
        HEAD + "stack:\n  - {use: lora, with: {ranks: {q: ▸'1'}}}\n",
        "stack[0].with.ranks.q",
        ["a whole number"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {start: ▸zer}}\n",
        "stack[0].with.start",
        ["did you mean 'zero'?"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {window: ▸1.5}}\n",
        "stack[0].with.window",
        ["a whole number or 'auto'"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {schedule: {▸shap: line}}}\n",
        "stack[0].with.schedule.shap",
        ["did you mean 'shape'?"],
    ),
    (
        HEAD + "stack:\n  - {use: lora, with: {targets: ▸'a?'}}\n",
        "stack[0].with.targets",
        ["'a?' selects nothing", "'attention.q'"],
    ),
    (
        HEAD + "stack:\n  - {use: prefixquant, with: {bits: ▸5}}\n",
        "stack[0].with.bits",
        ["2, 3, 4 or 8", "got: the number 5"],
    ),
    (
        HEAD + "stack:\n  - ▸mosaic-it\n",
        "stack[0].with.keep",
        ["missing option of 'mosaic-it': 'keep'", "fraction of"],
    ),
    (HEAD + "▸train:\n", "train", ["'train' has no value", "write {} for the defaults"]),
    (HEAD + "▸output:\n", "output", ["'output' has no value"]),
    (HEAD + "▸run:\n", "run", ["'run' has no value"]),
    (HEAD + "▸train: {}\n", "train", ["nothing to train on", "data: {train: file}"]),
    (HEAD + TRAINED + "train: {steps: ▸0}\n", "train.steps", ["at least 1"]),
    (HEAD + TRAINED + "train: {▸step: 1}\n", "train.step", ["did you mean 'steps'"]),
    (HEAD + TRAINED + "train: {learning_rate: ▸fast}\n", "train.learning_rate", ["expected: a number"]),
    (HEAD + TRAINED + "train: {learning_rate: ▸.inf}\n", "train.learning_rate", ["a finite number"]),
    (HEAD + TRAINED + "train: {seed: ▸4294967296}\n", "train.seed", ["less than 4294967296"]),
    (HEAD + TRAINED + "train: {optimizer: ▸adam}\n", "train.optimizer", ["did you mean 'adamw'?"]),
    (HEAD + TRAINED + "train: {schedule: ▸cosin}\n", "train.schedule", ["did you mean 'cosine'?"]),
    (
        HEAD + HELD_OUT + "evaluate: [▸perplexty]\n",
        "evaluate[0]",
        ["no metric 'perplexty'", "did you mean 'perplexity'?"],
    ),
    (
        HEAD + HELD_OUT + "evaluate: [{▸zzz: {}}]\n",
        "evaluate[0].zzz",
        ["one of perplexity, accuracy, exact-match"],
    ),
    (HEAD + HELD_OUT + "evaluate: [▸language-ranker]\n", "evaluate[0]", ["no metric 'language-ranker'"]),
    (
        HEAD + HELD_OUT + "evaluate: [{accuracy: {▸pth: x}}]\n",
        "evaluate[0].accuracy.pth",
        ["did you mean 'path'?"],
    ),
    (HEAD + HELD_OUT + "evaluate: [▸{accuracy: {}, perplexity: {}}]\n", "evaluate[0]", ["at most 1 entry"]),
    (HEAD + HELD_OUT + "evaluate: [▸{}]\n", "evaluate[0]", ["at least 1 entry"]),
    (HEAD + HELD_OUT + "evaluate: ▸accuracy\n", "evaluate", ["expected: a list"]),
    (HEAD + "evaluate: [▸accuracy]\n", "evaluate[0]", ["'accuracy' has no data", "accuracy: {path: ...}"]),
    (HEAD + "run: ▸[]\n", "run", ["at least 1 entry"]),
    (HEAD + "run: [{▸injekt: all}]\n", "run[0].injekt", ["did you mean 'inject'?"]),
    (HEAD + "run: [▸{}]\n", "run[0]", ["exactly one key, this one has none"]),
    (HEAD + "run: [▸{save: x, inject: all}]\n", "run[0]", ["this one has inject and save"]),
    (HEAD + "run: [{inject: ▸[]}]\n", "run[0].inject", ["at least 1 entry"]),
    (
        HEAD + "run: [{inject: ▸lroa}]\nstack: [lora]\n",
        "run[0].inject",
        ["'lroa', which is not in the stack", "did you mean 'lora'?"],
    ),
    (HEAD + "run:\n  - inject: [▸x]\n", "run[0].inject[0]", ["none: the stack is empty"]),
    (HEAD + "run:\n  - inject: [lora, ▸lora]\nstack: [lora]\n", "run[0].inject[1]", ["lists 'lora' twice"]),
    (
        HEAD + "run: [inject, {compress: ▸lora}]\nstack: [lora]\n",
        "run[1].compress",
        ["'lora', which has no compress hook"],
    ),
    (
        HEAD + "run: [{inject: [▸prefixquant, lora]}, compress]\nstack: [prefixquant, lora]\n",
        "run[0].inject[0]",
        ["expected: one of lora"],
    ),
    (
        HEAD + "stack: [▸lora]\nrun: [save]\noutput: x\n",
        "stack[0]",
        ["no stage of 'run' lists it", "add '- inject: lora'"],
    ),
    (
        HEAD + DATA + "stack: [lora]\nrun: [inject, {train: {plugins: ▸x}}]\n",
        "run[1].train.plugins",
        ["not in the stack"],
    ),
    (
        HEAD + DATA + "stack: [lora]\nrun: [inject, {train: {plugins: [lora, ▸x]}}]\n",
        "run[1].train.plugins[1]",
        ["'x'"],
    ),
    (HEAD + DATA + "run: [{train: {steps: ▸0}}]\n", "run[0].train.steps", ["at least 1"]),
    (HEAD + DATA + "run: [{train: {▸stps: 1}}]\n", "run[0].train.stps", ["did you mean 'steps'"]),
    (HEAD + "run: [▸train]\n", "run[0].train", ["nothing to train on"]),
    (HEAD + DATA + "▸train: {}\nrun: [prepare]\n", "train", ["'run' has no train stage"]),
    (HEAD + "run: [▸evaluate]\n", "run[0].evaluate", ["nothing to evaluate"]),
    (
        HEAD + HELD_OUT + "evaluate: [accuracy]\nrun:\n  - evaluate: {name: a}\n  - evaluate: {name: ▸a}\n",
        "run[1].evaluate.name",
        ["named 'a'"],
    ),
    (
        HEAD + HELD_OUT + "evaluate: [accuracy]\nrun: [{evaluate: {name: ▸'a/b'}}]\n",
        "run[0].evaluate.name",
        ["text that matches"],
    ),
    (HEAD + "run: [▸save]\n", "run[0].save", ["'save' has no path", "no 'output'"]),
    (HEAD + "output: o\nrun: [save, prepare, {▸save: }]\n", "run[2].save", ["would replace the first"]),
    (HEAD + "run: [{save: {▸pth: x}}]\n", "run[0].save.pth", ["did you mean 'path'?"]),
    (
        HEAD + "run: [inject]\nstack: [{use: qlora, ▸phase: after-training}]\n",
        "stack[0].phase",
        ["no effect beside 'run'"],
    ),
    (HEAD + "stack: [lora]\ndata: {▸train: t}\n", "data.train", ["nothing is trained", "add 'train: {}'"]),
    (HEAD + "stack: [lora]\ndata: {▸train: t}\nrun: [inject]\n", "data.train", ["add '- train' to 'run'"]),
    (HEAD + "stack: [language-ranker]\ndata: {▸train: t}\n", "data.train", ["leave data.train out"]),
    (
        HEAD + "stack: [prefixquant]\ndata: {▸train: t, calibration: c}\n",
        "data.train",
        ["nothing is trained"],
    ),
    (
        HEAD + "stack: [lora]\ndata: {▸calibration: c}\n",
        "data.calibration",
        ["no plugin of the stack compresses"],
    ),
    (HEAD + DATA + "▸train: {}\n", "train", ["there is nothing to train", "peftx list --hook inject"]),
    (HEAD + DATA + "stack: [language-ranker]\n▸train: {}\n", "train", ["there is nothing to train"]),
    (HEAD + DATA + "stack: [prefixquant]\n▸train: {}\n", "train", ["or leave 'train' out"]),
    (HEAD + DATA + "stack: [prefixquant]\nrun: [compress, ▸train]\n", "run[1].train", ["nothing to train"]),
    (
        HEAD + HELD_OUT + "▸evaluate: [accuracy]\nrun: [save]\noutput: o\n",
        "evaluate",
        ["'run' has no evaluate stage", "add '- evaluate' to 'run'"],
    ),
    (
        HEAD + "data: {eval: {path: e, format: text}}\nevaluate: [▸accuracy]\n",
        "evaluate[0]",
        ["they are text", "rows of classification", "there is perplexity"],
    ),
    (
        HEAD + "data: {eval: {path: e, format: preference}}\nevaluate: [▸perplexity]\n",
        "evaluate[0]",
        ["they are preference", "another file"],
    ),
    (
        HEAD + "data: {eval: e}\nevaluate: [{▸exact-match: {path: x, format: messages}}]\n",
        "evaluate[0].exact-match",
        ["rows of prompt-completion"],
    ),
    (
        HEAD
        + "stack: [lora]\ntrain: {}\ndata: {train: {path: t, format: messages}, holdout: .1}\nevaluate: [▸accuracy]\n",
        "evaluate[0]",
        ["they are messages"],
    ),
    (
        HEAD + "stack: [lora]\ndata: {train: t}\ntrain: {▸eval_steps: 5}\n",
        "train.eval_steps",
        ["nothing to measure on while it trains", "data: {eval: file}"],
    ),
    (
        HEAD + "stack: [lora]\ndata: {train: t}\ntrain: ▸{steps: 5, num_train_epochs: 2}\n",
        "train",
        ["steps and num_train_epochs both say how long: leave one out"],
    ),
    (
        HEAD + "stack: [lora]\ndata: {train: t}\ntrain: ▸{load_best_model_at_end: true}\n",
        "train",
        ["load_best_model_at_end needs measurements: set eval_steps"],
    ),
    (HEAD + "data: {▸holdout: 0.1}\n", "data.holdout", ["keeps rows of data.train", "data: {train: file}"]),
    (
        HEAD + "stack: [lora]\ntrain: {}\ndata: {train: t, eval: e, ▸holdout: 0.1}\n",
        "data.holdout",
        ["exclude each other"],
    ),
    (
        HEAD + "stack: [lora, prefixquant]\ntrain: {}\ndata: {train: t, holdout: 0.1, calibration: ▸t}\n",
        "data.calibration",
        ["rows that 'holdout' keeps back", "leave 'calibration' out"],
    ),
    *(
        (
            HEAD + f"stack: [lora]\ntrain: {{}}\ndata: {{train: t, holdout: ▸{value}}}\n",
            "data.holdout",
            [word],
        )
        for value, word in (
            ("0", "greater than 0"),
            ("1", "less than 1"),
            ("1.5", "less than 1"),
            ("-0.1", "greater than 0"),
            ("true", "a mapping"),
            ("some", "a mapping"),
            ("'0.1'", "a mapping"),
            ("[0.1]", "a mapping"),
        )
    ),
    (HEAD + "data: {▸holdout: }\n", "data.holdout", ["'holdout' has no value"]),
    (
        HEAD + "stack: [lora]\ntrain: {}\ndata: {train: t, holdout: {▸shar: 0.1}}\n",
        "data.holdout.shar",
        ["did you mean 'share'?"],
    ),
    (
        HEAD + "stack: [lora]\ntrain: {}\ndata: {train: t, holdout: {most: ▸0}}\n",
        "data.holdout.most",
        ["at least 1"],
    ),
    (HEAD + "output: ▸${env:PEFTX_NOT_SET}\n", "output", ["PEFTX_NOT_SET is not set"]),
    (
        HEAD + TRAINED + "train: {steps: ▸'${env:PEFTX_NOT_SET}'}\n",
        "train.steps",
        ["PEFTX_NOT_SET is not set"],
    ),
    (HEAD + "output: a\n▸output: b\n", "output", ["stands twice: first at line 3, column 1"]),
]


@pytest.mark.parametrize(("marked", "path", "words"), CASES)
def test_mistake(problems: Callable[[str], list[Problem]], marked: str, path: str, words: list[str]) -> None:
    text = marked.replace(MARK, "")
    before = marked[: marked.index(MARK)].split("\n")
    found = [problem for problem in problems(text) if problem.path == path]
    assert [(problem.line, problem.column) for problem in found] == [(len(before), len(before[-1]) + 1)]
    for word in words:
        assert word in str(found[0])
    assert found[0].snippet == text.split("\n")[len(before) - 1]


def test_the_table_blames_every_character_once() -> None:
    assert all(marked.count(MARK) == 1 for marked, _, _ in CASES)


@pytest.mark.parametrize(("marked", "path", "words"), CASES)
def test_one_mistake_is_one_problem(
    problems: Callable[[str], list[Problem]], marked: str, path: str, words: list[str]
) -> None:
    others = [problem for problem in problems(marked.replace(MARK, "")) if problem.path != path]
    assert [str(other) for other in others] == []
