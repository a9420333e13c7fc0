"""Several bundles over one base: alone each computes what it computes by itself, and the weights lie in memory once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn

import peftx
from peftx import Plugin, Stack, hookimpl
from peftx.copies import sharing
from peftx.errors import BundleError, ConflictError, PeftxError
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.together import Bases, load_together
from peftx.toolkits.serving import Request, Scheduler, Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.crowd import adopt
from peftx.toolkits.serving.models import Models, UnknownModel
from peftx_bitdelta import BitDelta
from peftx_bitfit import Bitfit
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning
from peftx_signround import SignRound

ASKED = {"prompt": "Once", "max_tokens": 6, "temperature": 0}


def moved(stack: Stack, seed: int) -> None:
    """Off their first values, or all would compute the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in stack.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundles(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    plugins: dict[str, list[Plugin]] = {
        "lora": [Lora(rank=2)],
        "prompt": [PromptTuning(length=3)],
        "bias": [Bitfit()],
        "both": [Lora(rank=2), PromptTuning(length=2)],
    }
    for seed, (name, members) in enumerate(plugins.items()):
        stack = Stack(str(base), members)
        moved(stack, seed)
        stack.save(folder / name)
    packed = Stack(str(base), [SignRound(steps=1)])
    packed.compress(["Once upon a time there was a text."] * 4, samples=4, length=16)
    packed.save(folder / "packed")
    return {path.name: path for path in folder.iterdir()}


def logits(stack: Stack) -> Tensor:
    return output_of(stack.model, example_inputs(stack.model))


def weights(model: nn.Module) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


@pytest.fixture(scope="module")
def together(bundles: dict[str, Path], base: Path) -> dict[str, Stack]:
    return load_together({**bundles, "plain": base})


@pytest.mark.parametrize("name", ["lora", "prompt", "bias", "both", "packed"])
def test_each_computes_what_it_does_alone(
    together: dict[str, Stack], bundles: dict[str, Path], name: str
) -> None:
    alone = peftx.load(bundles[name])
    assert torch.equal(logits(together[name]), logits(alone))
    assert together[name].generate("Once", max_new_tokens=5) == alone.generate("Once", max_new_tokens=5)
    assert together[name].base_id == alone.base_id


def test_the_weights_lie_in_memory_once(together: dict[str, Stack]) -> None:
    plain = weights(together["plain"].model)
    assert plain <= weights(together["lora"].model)
    assert plain <= weights(together["prompt"].model)
    biases = {p.data_ptr() for name, p in together["plain"].model.named_parameters() if name.endswith("bias")}
    assert plain - biases <= weights(together["bias"].model)
    assert not plain & weights(together["packed"].model)  # it holds its base itself


def test_what_one_trains_another_does_not_see(bundles: dict[str, Path]) -> None:
    stacks = load_together({name: bundles[name] for name in ("bias", "lora")})
    before = logits(stacks["lora"])
    stacks["bias"].train([{"prompt": "a", "completion": "b"}] * 4, steps=2, batch_size=2, learning_rate=0.1)
    stacks["bias"].remove("bitfit")
    assert torch.equal(logits(stacks["lora"]), before)


def test_tenants_of_one_bit_share_a_batch_and_the_base(tmp_path: Path) -> None:
    """What trained and was packed since is the base's own once it is served; a head of a tenant's own is read."""
    base = tiny("llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed in range(2):
        stack = Stack(str(tmp_path / "base"), [BitDelta(steps=1)])
        moved(stack, seed)
        stack.compress(["Once upon a time there was a text."] * 4, samples=4, length=16)
        stack.save(tmp_path / str(seed))
    stacks = load_together(
        {**{str(seed): tmp_path / str(seed) for seed in range(2)}, "plain": tmp_path / "base"}
    )
    texts = {
        name: stack.generate("Once", max_new_tokens=6, do_sample=False) for name, stack in stacks.items()
    }
    assert len(set(texts.values())) == 3
    matrices = {p.data_ptr() for p in stacks["plain"].model.model.layers.parameters() if p.dim() == 2}
    assert not matrices & weights(stacks["0"].model)
    with Models([Server(stack, name=name) for name, stack in stacks.items()]) as models:
        assert {engine.about()["batching"] for engine in models} == {"shared"}
        assert matrices <= weights(stacks["0"].model)
        assert matrices <= weights(stacks["1"].model)
        jobs = {
            name: models.engine(name).submit(Request("Once", max_tokens=6, temperature=0)) for name in stacks
        }
        assert {name: job.result(60).text for name, job in jobs.items()} == texts
    with stacks["0"].disabled():
        assert torch.allclose(logits(stacks["0"]), logits(stacks["plain"]), atol=1e-5)
    assert stacks["0"].generate("Once", max_new_tokens=6, do_sample=False) == texts["0"]


def test_what_still_trains_is_not_given_to_the_base(bundles: dict[str, Path], base: Path) -> None:
    """A trained bias that is the base's still has its own place."""
    stack = Stack(sharing(peftx.load_model(str(base))[0].requires_grad_(False)), [Bitfit()])
    biases = {p.data_ptr() for p in stack.model.parameters() if p.requires_grad}
    adopt(stack)
    assert biases == {p.data_ptr() for p in stack.model.parameters() if p.requires_grad}


def test_a_base_of_another_dtype_is_another_base(base: Path, tmp_path: Path) -> None:
    model, tokenizer = peftx.load_model(str(base), dtype="bfloat16")
    Stack(model, [Lora(rank=2)], tokenizer=tokenizer).save(tmp_path / "half")
    bases = Bases(model=str(base))
    half, whole = bases.stack(tmp_path / "half"), bases.stack(base)
    assert half.model.dtype == torch.bfloat16
    assert whole.model.dtype == torch.float32


def test_another_base_is_refused_and_the_first_is_as_it_was(
    bundles: dict[str, Path], tmp_path: Path, base: Path
) -> None:
    tiny("gpt2", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    bases = Bases(model=str(tmp_path / "other"))
    before = logits(bases.stack(tmp_path / "other"))
    with pytest.raises(BundleError, match="is another base model"):
        bases.stack(bundles["lora"])
    assert torch.equal(logits(bases.stack(tmp_path / "other")), before)


def test_a_model_with_plugins_is_not_shared() -> None:
    stack = Stack(tiny("gpt2"), [Lora(rank=2)])
    with pytest.raises(ConflictError, match="plugins stand on the model"):
        sharing(stack.model)


# ------------------------------------------------------------------------------------------------------- the server
def servers(stacks: dict[str, Stack]) -> list[Server]:
    return [Server(stack, name=name, scheduler=Scheduler(max_wait_ms=0)) for name, stack in stacks.items()]


@pytest.fixture
def http(together: dict[str, Stack], bundles: dict[str, Path]) -> Iterator[TestClient]:
    chosen = {name: together[name] for name in ("plain", "lora", "prompt")}

    def loader(name: str, path: str) -> Server:
        return Server(Bases().stack(bundles[path]), name=name, scheduler=Scheduler(max_wait_ms=0))

    with TestClient(build_app(*servers(chosen), loader=loader)) as found:
        yield found


def text(http: TestClient, model: str, **more: Any) -> str:
    answer = http.post("/v1/completions", json={"model": model, **ASKED, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def test_a_request_is_answered_by_the_model_that_it_names(
    http: TestClient, together: dict[str, Stack]
) -> None:
    said = {name: text(http, name) for name in ("plain", "lora", "prompt")}
    assert said == {name: together[name].generate("Once", max_new_tokens=6) for name in said}
    assert len(set(said.values())) == 3
    assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["plain", "lora", "prompt"]
    assert "lora" in http.get("/v1/models/lora").json()["plugins"]
    health = http.get("/health").json()
    assert health["served"] == sum(one["served"] for one in health["models"].values()) == 3
    assert http.post("/tokenize", json={"prompt": "Once"}).status_code == 200  # of the first


def test_what_prometheus_reads(http: TestClient) -> None:
    for name in ("lora", "lora", "prompt"):
        text(http, name)
    assert (
        http.post("/v1/completions", json={"model": "lora", **ASKED, "logit_bias": {"5": 101}}).status_code
        == 400
    )
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["peftx_requests_total", "length", "lora"] == 2
    assert found["peftx_requests_total", "length", "prompt"] == 1
    assert found["peftx_generation_tokens_total", "lora"] == 12
    assert found["peftx_prompt_tokens_total", "lora"] == 2 * len("Once")
    assert found["peftx_request_seconds_count", "lora"] == 2
    assert found["peftx_requests_waiting", "plain"] == 0


def test_an_unknown_model_is_told_the_nearest(http: TestClient) -> None:
    answer = http.post("/v1/completions", json={"model": "lorra", **ASKED})
    assert answer.status_code == 404
    assert "did you mean 'lora'" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "not_found"


def test_models_come_and_go_while_others_are_served(http: TestClient, together: dict[str, Stack]) -> None:
    came = http.post("/v1/load_lora_adapter", json={"lora_name": "second", "lora_path": "both"})
    assert (came.status_code, came.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    assert text(http, "second") == together["both"].generate("Once", max_new_tokens=6)
    again = http.post("/v1/load_lora_adapter", json={"lora_name": "second", "lora_path": "both"})
    assert again.status_code == 400
    assert "'second' is served already" in again.json()["error"]["message"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
    assert http.post("/v1/completions", json={"model": "second", **ASKED}).status_code == 404
    first = http.post("/v1/unload_lora_adapter", json={"lora_name": "plain"})
    assert "answers where no model is named" in first.json()["error"]["message"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 404


def test_a_bundle_that_goes_answers_what_was_asked(together: dict[str, Stack]) -> None:
    """Every request that got in is answered, in full; none after it."""
    models = Models(servers({"plain": together["plain"], "lora": together["lora"]}))
    with models:
        engine = models.engine("lora")
        jobs = [engine.submit(Request("Once", max_tokens=6, seed=n)) for n in range(8)]
        thread = threading.Thread(target=models.unload, args=("lora",))
        thread.start()
        answers = [job.future.result(60).text for job in jobs]
        thread.join(60)
        assert not thread.is_alive()
        with pytest.raises(UnknownModel):
            models.engine("lora")
        with pytest.raises(PeftxError, match="'lora' is closing"):
            engine.submit(Request("Once"))
    assert len(answers) == 8
    assert all(answers)


def test_many_clients_of_several_models_at_once(http: TestClient, together: dict[str, Stack]) -> None:
    expected = {
        name: together[name].generate("Once", max_new_tokens=6) for name in ("plain", "lora", "prompt")
    }
    wrong: list[str] = []

    def ask(name: str) -> None:
        if text(http, name) != expected[name]:
            wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in list(expected) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_two_of_one_name_are_refused(together: dict[str, Stack]) -> None:
    with pytest.raises(PeftxError, match="two models are named 'plain'"):
        build_app(*servers({"plain": together["plain"]}) * 2)


def test_a_server_that_loads_nothing_says_so(together: dict[str, Stack]) -> None:
    with TestClient(build_app(*servers({"plain": together["plain"]}))) as http:
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "../.."})
    assert answer.status_code == 400
    assert "this server loads no adapters" in answer.json()["error"]["message"]


class Routed(Plugin):
    """Brings a route of its own."""

    @hookimpl
    def serve(self, server: Server) -> None:
        server.add_route("GET", "/about", lambda: {"model": server.name})


def test_routes_of_later_models_begin_with_their_name() -> None:
    app = build_app(
        *(
            Server(Stack(tiny("llama"), [Routed()], tokenizer=tiny_tokenizer()), name=n)
            for n in ("one", "two")
        )
    )
    with TestClient(app) as http:
        assert http.get("/about").json() == {"model": "one"}
        assert http.get("/two/about").json() == {"model": "two"}


def test_a_bundle_with_routes_is_not_loaded_later(together: dict[str, Stack]) -> None:
    def loader(name: str, path: str) -> Server:
        return Server(Stack(tiny("llama"), [Routed()], tokenizer=tiny_tokenizer()), name=name)

    models = Models(servers({"plain": together["plain"]}), loader)
    with pytest.raises(PeftxError, match="routes of its own"):
        models.load("other", "there")
    assert [engine.server.name for engine in models] == ["plain"]
