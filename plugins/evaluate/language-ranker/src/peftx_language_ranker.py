"""Language Ranker: how close sentences of other languages lie to their English translations, layer by layer.

"Language Ranker: A Metric for Quantifying LLM Performance Across High and Low-Resource Languages" (arXiv:2404.11553).
For pairs of a sentence x_j in language l and its English translation e_j, j = 1..N:

    h_k(x)    state of the last token of x after block k = 1..L, x read alone
    s_l(k)  = 1/N sum_j cos(h_k(x_j), h_k(e_j))                      the curve of a language
    S_l     = mean of s_l(k) over the chosen layers                  its score; English itself has 1

The languages are ranked by S_l. With the share p_l of each in the pre-training data, their agreement is Spearman's
correlation of S and p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.sax.saxutils import escape

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from peftx import Evaluation, ModelView, Plugin, PluginConfig, hookimpl
from peftx.engines.data import Collator, prompt_ids, read_dataset
from peftx.errors import ArchitectureError, DataError, OptionError, nearest
from peftx.toolkits.evaluation import bootstrap_ratio, context_window, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Our own sentences, for a first look without a file.
BUILT_IN = """
en | de | fr | es | tr | sw
The water is cold today. | Das Wasser ist heute kalt. | L'eau est froide aujourd'hui. | El agua está fría hoy. | Su bugün soğuk. | Maji ni baridi leo.
My sister lives in a small house. | Meine Schwester wohnt in einem kleinen Haus. | Ma sœur habite dans une petite maison. | Mi hermana vive en una casa pequeña. | Kız kardeşim küçük bir evde yaşıyor. | Dada yangu anaishi katika nyumba ndogo.
The children read a book at school. | Die Kinder lesen in der Schule ein Buch. | Les enfants lisent un livre à l'école. | Los niños leen un libro en la escuela. | Çocuklar okulda bir kitap okuyor. | Watoto wanasoma kitabu shuleni.
We buy bread every morning. | Wir kaufen jeden Morgen Brot. | Nous achetons du pain chaque matin. | Compramos pan todas las mañanas. | Her sabah ekmek alıyoruz. | Tunanunua mkate kila asubuhi.
The old man opened the door. | Der alte Mann öffnete die Tür. | Le vieil homme ouvrit la porte. | El anciano abrió la puerta. | Yaşlı adam kapıyı açtı. | Mzee alifungua mlango.
Where is the train station? | Wo ist der Bahnhof? | Où est la gare ? | ¿Dónde está la estación de tren? | Tren istasyonu nerede? | Kituo cha treni kiko wapi?
It will rain tomorrow. | Morgen wird es regnen. | Il va pleuvoir demain. | Mañana va a llover. | Yarın yağmur yağacak. | Mvua itanyesha kesho.
The doctor works in the big hospital. | Der Arzt arbeitet im großen Krankenhaus. | Le médecin travaille dans le grand hôpital. | El médico trabaja en el hospital grande. | Doktor büyük hastanede çalışıyor. | Daktari anafanya kazi katika hospitali kubwa.
I do not understand this word. | Ich verstehe dieses Wort nicht. | Je ne comprends pas ce mot. | No entiendo esta palabra. | Bu kelimeyi anlamıyorum. | Sielewi neno hili.
Thank you for your help. | Danke für deine Hilfe. | Merci pour ton aide. | Gracias por tu ayuda. | Yardımın için teşekkür ederim. | Asante kwa msaada wako.
"""  # noqa: E501


Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class LanguageRankerConfig(PluginConfig):
    """Options of Language Ranker; the paper reads the last token and compares with English."""

    pairs: str | None = Field(None, description="file with a column for each language; none: see Use")
    english: str = Field("en", min_length=1, description="column that the others are compared with")
    languages: tuple[str, ...] = Field((), description="columns to compare; all others unless given")
    layers: tuple[int, ...] = Field(
        (), description="blocks in the score, 1..L or -1 for the last; empty: all"
    )
    shares: dict[str, Share] = Field(
        {}, description="share of languages in the pre-training data, over 0 up to 1, for `spearman`"
    )
    batch_size: int = Field(16, ge=1, description="sentences in one forward pass")
    curves: bool = Field(True, description="give the similarity at every layer, as scores and a figure")

    @field_validator("languages")
    @classmethod
    def _once(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((name for name in languages if languages.count(name) > 1), None):
            raise ValueError(f"'{twice}' stands twice")
        return languages


def built_in() -> list[dict[str, str]]:
    """The module's own pairs: ten sentences in six languages."""
    header, *lines = ([cell.strip() for cell in line.split("|")] for line in BUILT_IN.strip().splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def last_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """h_k of each text, k = 1..L: float32 [N, L, D], on the CPU.

    The pads stand right whatever the tokenizer's side is: no token of a causal model sees them, and positions count
    from the text's own start.
    """
    rows = [{"input_ids": prompt_ids(tokenizer, text)} for text in texts]
    lengths, limit = [len(row["input_ids"]) for row in rows], context_window(model, tokenizer)
    if max(lengths) > limit:
        text = texts[lengths.index(max(lengths))]
        raise DataError(f"a sentence has {max(lengths)} tokens and the model reads {limit}: {text[:60]!r}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = Collator(pad, padding_side="right")(rows)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    states = model(**batch, output_hidden_states=True).hidden_states[1:]  # L of [N, T, D], no embedding
    soft = states[0].shape[1] - batch["input_ids"].shape[1]  # soft tokens may stand in front
    last = torch.tensor(lengths) - 1 + soft  # [N]
    return torch.stack([state[torch.arange(len(texts)), last].float().cpu() for state in states], 1)


def similarities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    english: str,
    languages: Sequence[str],
    batch_size: int,
) -> dict[str, Tensor]:
    """cos(h_k(x_j), h_k(e_j)) of every language: float64 [N, L]. A row without a sentence in l is no pair of l."""
    found: dict[str, list[Tensor]] = {language: [] for language in languages}
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        reference = last_states(model, tokenizer, [row[english] for row in chunk])
        for language in languages:
            have = [j for j, row in enumerate(chunk) if row.get(language)]
            if have:
                states = last_states(model, tokenizer, [chunk[j][language] for j in have])
                found[language].append(cosine_similarity(states.double(), reference[have].double(), dim=-1))
    return {language: torch.cat(parts) for language, parts in found.items()}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        r = (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2
        return r - r.mean()

    ra, rb = ranks(a), ranks(b)
    return float(ra @ rb / (ra.norm() * rb.norm()))


def figure(curves: Mapping[str, Tensor]) -> str:
    """The curves s_l(k) as SVG: blocks to the right, similarity upwards, a line for each language."""
    low, high = (float(f(torch.cat(list(curves.values())))) for f in (torch.min, torch.max))
    blocks = len(next(iter(curves.values())))
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif">']
    parts += [f'<text x="4" y="34">{high:.3f}</text>', f'<text x="4" y="374">{low:.3f}</text>']
    parts.append(f'<text x="60" y="394">similarity with English after block 1 to {blocks}</text>')
    for number, (language, curve) in enumerate(curves.items()):
        color = f"hsl({360 * number // len(curves)} 70% 40%)"
        xs = [60 + 520 * k / max(1, blocks - 1) for k in range(blocks)]
        ys = [30 + 340 * (high - s) / max(high - low, 1e-9) for s in curve.tolist()]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline fill="none" stroke="{color}" points="{points}"/>')
        parts.append(f'<text x="{xs[-1] + 4:.1f}" y="{ys[-1]:.1f}" fill="{color}">{escape(language)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class LanguageRanker(Plugin):
    """See the module."""

    Config = LanguageRankerConfig
    example = {"english": "prompt"}  # of the kit's rows; their completions are the other language
    refuses = {"t5": "its encoder and its decoder each have a last token"}
    config: LanguageRankerConfig

    def suits(self, model: ModelView) -> None:
        if model.config.is_encoder_decoder:
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} has two last tokens, its encoder's and its decoder's",
                hint="take a decoder or an encoder",
            )

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `similarity/<language>`, `rank/<language>`, with `curves` `similarity/<language>/layer-<k>`, and with
        `shares` `spearman`; the curves also go to `language-ranker.svg` in the run's folder."""
        config, model = self.config, evaluation.stack.model
        rows = self._rows(evaluation)
        languages = self._languages(rows)
        with evaluating(model):
            found = similarities(
                model, evaluation.stack.tokenizer, rows, config.english, languages, config.batch_size
            )
        curves = {language: found[language].mean(0) for language in languages}  # s_l(k): [L]
        chosen = self._layers(len(next(iter(curves.values()))))
        S = {language: float(curve[chosen].mean()) for language, curve in curves.items()}
        order = sorted(languages, key=lambda language: -S[language])
        for rank, language in enumerate(order, start=1):
            values = found[language][:, chosen].mean(1).tolist()
            ends = bootstrap_ratio(values, [1.0] * len(values))  # over pairs
            low, high = (min(ends[0], S[language]), max(ends[1], S[language])) if ends else (None, None)
            evaluation.add(f"similarity/{language}", S[language], low, high, len(values), "cosine")
            evaluation.add(f"rank/{language}", rank, count=len(order))
        for language in order if config.curves else ():
            for k, value in enumerate(curves[language].tolist(), start=1):
                evaluation.add(f"similarity/{language}/layer-{k}", value, unit="cosine")
        if config.curves and evaluation.output_dir is not None:
            evaluation.output_dir.mkdir(parents=True, exist_ok=True)
            path = evaluation.output_dir / "language-ranker.svg"
            path.write_text(figure({language: curves[language] for language in order}), encoding="utf-8")
        if config.shares:
            self._correlate(evaluation, S)

    def _rows(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        """The pairs: of the file, else the evaluation's rows, else, where there are none, the built-in ones."""
        config = self.config
        if config.pairs is not None:
            read = read_dataset(Path(config.pairs), format="text", columns={"text": config.english})
            rows = [{config.english: row.pop("text"), **row} for row in read]
        elif "eval" in evaluation.data:
            given = evaluation.rows("eval")
            rows = [dict(row) if isinstance(row, Mapping) else {"text": row} for row in given]
        else:
            rows = built_in()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if config.english not in columns:
            raise DataError(
                f"language-ranker: no column '{config.english}' in the rows; columns: {', '.join(columns) or 'none'}",
                hint="set `english` to one of them, or `pairs` to a file with a column for each language",
            )
        for index, row in enumerate(rows):
            if not isinstance(row.get(config.english), str) or not row[config.english].strip():
                raise DataError(
                    f"row {index} (counting from 0) has no sentence in '{config.english}': {row!r:.80}"
                )
        return rows

    def _languages(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The columns to compare; each has a sentence in some row, and nothing but sentences."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        chosen = list(self.config.languages) or [name for name in columns if name != self.config.english]
        if not chosen:
            raise DataError(f"the rows have no column beside '{self.config.english}'")
        for name in chosen:
            if name not in columns:
                raise OptionError(
                    f"language-ranker: languages: no column '{name}' in the rows",
                    hint=nearest(name, columns) or f"columns: {', '.join(columns)}",
                )
            cells = [row.get(name) for row in rows if row.get(name) is not None]
            bad = [cell for cell in cells if not isinstance(cell, str) or not cell.strip()]
            if bad or not cells:
                found = f"holds {bad[0]!r}" if bad else "is empty"
                raise DataError(
                    f"column '{name}' {found}; it needs sentences", hint="name the columns in `languages`"
                )
        return chosen

    def _layers(self, count: int) -> list[int]:
        """Indices (from 0) of the chosen layers of `count`."""
        for k in self.config.layers:
            if k == 0 or abs(k) > count:
                raise OptionError(
                    f"language-ranker: layers: there is no block {k}",
                    hint=f"1 to {count}, or -1 to -{count} from the end",
                )
        return sorted({k - 1 if k > 0 else count + k for k in self.config.layers}) or list(range(count))

    def _correlate(self, evaluation: Evaluation, scores: Mapping[str, float]) -> None:
        shares = self.config.shares
        for name in shares:
            if name not in scores:
                raise OptionError(
                    f"language-ranker: shares: '{name}' is not ranked",
                    hint=nearest(name, scores) or f"ranked are {', '.join(scores)}",
                )
        if len(shares) < 3 or len(set(shares.values())) == 1:
            raise OptionError(
                f"language-ranker: shares: {shares} cannot be correlated",
                hint="give three languages or more, not all alike",
            )
        value = spearman([scores[name] for name in shares], list(shares.values()))
        evaluation.add("spearman", value, count=len(shares))
