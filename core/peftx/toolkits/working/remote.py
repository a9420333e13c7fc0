"""Answers of a server that speaks OpenAI's protocol: `peftx serve`, vLLM, or somebody's endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peftx.errors import MissingExtraError, WorkerError
from peftx.toolkits.working.answers import Answer


class Remote:
    """A model behind a server.

    Args:
        model: its name there. base_url: as `http://127.0.0.1:8000/v1`. api_key: if the server asks for one.
        chat: ask it as a chat, or to continue a text. parallel: requests at once. retries: of a request that failed.

    Raises:
        PeftxError: the client is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str = "none",
        chat: bool = True,
        parallel: int = 4,
        retries: int = 3,
        timeout: float = 60.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError(
                "a remote worker needs OpenAI's client", hint='pip install "peftx[worker]"'
            ) from error
        self.model, self.chat, self.parallel = model, chat, parallel
        self.name = f"remote:{base_url}:{model}:{'chat' if chat else 'text'}"
        self._failed: tuple[type[Exception], ...] = (openai.OpenAIError,)
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=retries, timeout=timeout)

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        options = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda prompt: self._ask(prompt, options), prompts))

    def _ask(self, prompt: str, options: dict[str, Any]) -> Answer:
        try:
            if self.chat:
                messages: Any = [{"role": "user", "content": prompt}]
                found: Any = self._client.chat.completions.create(messages=messages, **options)
                text, why = found.choices[0].message.content, found.choices[0].finish_reason
            else:
                found = self._client.completions.create(prompt=prompt, **options)
                text, why = found.choices[0].text, found.choices[0].finish_reason
        except self._failed as error:
            raise WorkerError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from error
        tokens = found.usage.total_tokens if found.usage is not None else 0
        refused = not (text or "").strip() or why == "content_filter"
        return Answer(text or "", tokens, refused)
