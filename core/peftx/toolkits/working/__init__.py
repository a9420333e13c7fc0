"""Language-model workers: models that write, score and choose text for a method, such as data that is synthesized or
selected.

worker.py    Worker: what a plugin asks; keeps answers by content, counts, resumes
answers.py   who answers: a stack, recorded answers, a function
kept.py      where answers lie between runs
remote.py    any server that speaks OpenAI's protocol (needs the extra `peftx[worker]`)
"""

from __future__ import annotations

from peftx.toolkits.working.answers import Answer, Answerer, OfStack, Recorded, Scripted
from peftx.toolkits.working.kept import kept_file
from peftx.toolkits.working.worker import Budget, Worker

__all__ = ["Answer", "Answerer", "Budget", "OfStack", "Recorded", "Scripted", "Worker", "kept_file"]
