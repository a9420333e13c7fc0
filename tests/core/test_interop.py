"""Adapters of HF PEFT in and out: the installed `peft` writes what we read, and reads what we write."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftx import Registry, Stack
from peftx.composition.adapters import CONFIG, WEIGHTS, entries, read_adapter
from peftx.composition.metadata import keyword_values
from peftx.errors import AdapterError, BundleError, PeftxError, RegistryError
from peftx.interop import import_peft, to_peft
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_dora import Dora
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)
MODULES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bloom": ["query_key_value"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "opt": ["q_proj", "fc1"],
    "bert": ["query", "dense"],
    "t5": ["q", "wi"],
    "bart": ["q_proj", "fc2"],
    "mixtral": ["q_proj", "o_proj"],
    "gemma2": ["k_proj", "up_proj"],
    "mamba": ["in_proj", "x_proj"],
    "gpt_oss": ["v_proj"],
    "whisper": ["q_proj"],
    "vit": ["q_proj"],
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_keywords_say_which_formats_a_plugin_knows() -> None:
    """By the keywords alone the plugin of an adapter is found, so that nothing else is imported."""
    for file in Path(__file__).parents[2].glob("plugins/*/*/pyproject.toml"):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        if "peftx.plugins" not in project["entry-points"]:  # a sampler, which no stack has
            continue
        ((name, _),) = project["entry-points"]["peftx.plugins"].items()
        types = [format.type for format in Registry().outline(name).peft]
        assert keyword_values(project["keywords"], "peft") == types, name


def logits(model: Any) -> Tensor:
    model.eval()
    bare = getattr(model, "get_base_model", lambda: model)()
    with torch.no_grad():
        return output_of(bare, example_inputs(bare))


def theirs(kind: str, folder: Path, config: Any = None, **options: Any) -> Any:
    """A PEFT model with random numbers in every adapter, and what it saves."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    usual = {"r": 4, "lora_alpha": 12, "target_modules": MODULES[kind], "init_lora_weights": False}
    config = config or LoraConfig(**{**usual, "fan_in_fan_out": kind == "gpt2", **options})
    model = get_peft_model(tiny(kind), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if any(part.startswith("lora_") for part in name.split(".")) and "magnitude" not in name:
                parameter.data.zero_()
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    return model


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", MODULES)
def test_lora_there_and_back(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = theirs(name, tmp_path / "theirs")
    stack = import_peft(tmp_path / "theirs", model=tiny(name))
    assert apart(logits(stack.model), logits(model)) <= 1e-6
    assert not torch.allclose(logits(stack.model), logits(tiny(name)), atol=1e-3)
    to_peft(stack, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
    assert apart(logits(again), logits(model)) <= 1e-6
    saved = [load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours")]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.parametrize(
    ("name", "options", "use"),
    [
        ("llama", {"use_rslora": True}, ["lora"]),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}}, ["lora"]),
        ("llama", {"target_modules": "all-linear"}, ["lora"]),
        ("llama", {"target_modules": r".*layers\.1.*q_proj"}, ["lora"]),
        ("llama", {"layers_to_transform": [1]}, ["lora"]),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}, ["lora", "full-finetuning"]),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, ["lora"]),
        ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}, ["lora"]),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, ["lora"]),
        ("llama", {"trainable_token_indices": [5, 1]}, ["lora", "full-finetuning"]),
        ("gpt2", {"bias": "lora_only"}, ["lora", "full-finetuning"]),
        ("gpt2", {"bias": "all"}, ["lora", "full-finetuning"]),
        ("mixtral", {"target_parameters": EXPERTS}, ["lora"]),
        ("mixtral", {"target_parameters": EXPERTS[:1]}, ["lora"]),
        ("mixtral", {"target_parameters": EXPERTS[1:], "target_modules": []}, ["lora"]),
        ("mixtral", {"target_parameters": ["down_proj", "0.mlp.experts.gate_up_proj"]}, ["lora"]),
        ("mixtral", {"target_parameters": EXPERTS, "rank_pattern": {r"layers\.0\.mlp\.experts\..*": 2}}, ["lora"]),
        ("mixtral", {
            "target_parameters": EXPERTS, "rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5},
        }, ["lora"]),
        ("mixtral", {"target_parameters": ["mlp.gate.weight"], "alpha_pattern": {"gate.weight": 5}}, ["lora"]),
        ("gpt_oss", {"target_parameters": EXPERTS[1:]}, ["lora"]),
        ("gpt2", {"lora_bias": True}, ["lora"]),
        ("bert", {"lora_bias": True, "rank_pattern": {"query": 2}, "bias": "lora_only"}, ["lora", "full-finetuning"]),
        ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}}, ["dora"]),
        ("gpt2", {"use_dora": True, "use_rslora": True, "alpha_pattern": {"c_attn": 5}}, ["dora"]),
        ("llama", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}, ["dora"]),
        ("gemma2", {"use_dora": True, "target_modules": ["embed_tokens"], "rank_pattern": {".*": 3}}, ["dora"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_a_config_of_lora_can_hold(
    name: str, options: dict[str, Any], use: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = theirs(name, tmp_path / "theirs", **options)
    stack = import_peft(tmp_path / "theirs", model=tiny(name))
    assert list(stack.plugins) == use
    assert apart(logits(stack.model), logits(model)) <= 1e-6
    to_peft(stack, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
    assert apart(logits(again), logits(model)) <= 1e-6


def test_updates_that_no_parameter_is_named_for(tmp_path: Path) -> None:
    theirs("mixtral", tmp_path, target_parameters=EXPERTS, target_modules=[])
    fields = json.loads((tmp_path / CONFIG).read_text()) | {"target_parameters": EXPERTS[:1]}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match=r"2 updates for .*experts, and its target_parameters name 1"):
        import_peft(tmp_path, model=tiny("mixtral"))


def test_a_router_goes_out_by_no_method_but_lora(tmp_path: Path) -> None:
    """PEFT would wrap its module as a layer, and the router would pass its update by."""
    with pytest.raises(AdapterError, match=r"gate is no layer but holds a weight.*not adapt by dora"):
        to_peft(Stack(tiny("mixtral"), [Dora(rank=2, targets="router")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_brings_its_head(tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    kind = tiny("bert").config
    kind.num_labels = 3

    def fresh() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(kind)

    model = get_peft_model(
        fresh(), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], init_lora_weights=False)
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(1.0)
    model.eval().save_pretrained(tmp_path)
    stack = import_peft(tmp_path, model=fresh())
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert apart(stack.model.eval()(input_ids=ids).logits, model(input_ids=ids).logits) <= 1e-6
    assert list(stack.plugins) == ["lora"]


def test_a_classifier_with_a_soft_prompt_brings_its_head(tmp_path: Path) -> None:
    """Its names lack the tuner's model, which a soft prompt has none of."""
    from peft import PeftModel, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    kind = tiny("llama").config
    kind.num_labels, kind.pad_token_id = 3, 0

    def fresh() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(kind)

    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(input_ids=torch.tensor([[1, 5, 7]])).logits
        return found

    model = get_peft_model(fresh(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "theirs")
    stack = import_peft(tmp_path / "theirs", model=fresh())
    assert apart(answer(stack.model), answer(model)) <= 2e-6
    to_peft(stack, tmp_path / "ours")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    assert apart(answer(again), answer(model)) <= 2e-6


def test_roles_of_a_fused_matrix_with_factors_of_their_own(tmp_path: Path) -> None:
    """Trained here, q, k and v have each an A: PEFT gets one of three times the rank."""
    from peft import PeftModel

    stack = Stack(tiny("gpt2"), [Lora(rank=2, targets="attention.q,v mlp", alphas={"attention.v": 3.0})])
    torch.manual_seed(0)
    for parameter in stack.ledger.parameters("lora"):
        parameter.data.normal_(std=0.1)
    to_peft(stack, tmp_path)
    again = PeftModel.from_pretrained(tiny("gpt2"), tmp_path).eval()
    assert apart(logits(again), logits(stack.model)) <= 1e-6


FEEDFORWARD = {"llama": "down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense", "t5": "wo", "opt": "fc2"}
METHODS: list[tuple[str, str, dict[str, Any], str]] = [
    *(
        ("IA3Config", name, {"target_modules": [*MODULES[name], last], "feedforward_modules": [last]}, "ia3")
        for name, last in FEEDFORWARD.items()
    ),
    ("IA3Config", "bloom", {"target_modules": ["query_key_value"], "feedforward_modules": []}, "ia3"),
    ("IA3Config", "phi3", {"target_modules": ["qkv_proj"], "feedforward_modules": []}, "ia3"),
    *(
        ("LoraConfig", name, {"use_dora": True, "r": 4, "lora_alpha": 12}, "dora")
        for name in ("llama", "gpt2", "gpt_neox", "phi3", "bert", "t5", "bart", "gemma2", "mamba")
    ),
    ("LoraConfig", "llama", {"use_dora": True, "r": 4, "use_rslora": True}, "dora"),
    *(("VeraConfig", name, {"r": 8}, "vera") for name in ("llama", "opt", "bert", "t5", "gemma2", "mamba")),
    ("VeraConfig", "llama", {"r": 48, "save_projection": False, "projection_prng_key": 7}, "vera"),
    *(
        ("OFTConfig", name, {"oft_block_size": 4, "use_cayley_neumann": False}, "oft")
        for name in ("llama", "gpt_neox", "phi3", "bert", "t5", "bart")
    ),
    ("OFTConfig", "llama", {"oft_block_size": 4}, "oft"),
    ("OFTConfig", "llama", {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 7}, "oft"),
    ("OFTConfig", "llama", {"oft_block_size": 8, "block_share": True}, "oft"),
    ("OFTConfig", "llama", {"oft_block_size": 8, "coft": True, "eps": 0.2}, "oft"),
    *(("BOFTConfig", name, {"boft_block_size": 4}, "oft") for name in ("llama", "opt", "bert", "t5")),
    ("BOFTConfig", "llama", {"boft_block_size": 0, "boft_block_num": 4}, "oft"),
    *(("LoKrConfig", name, {"r": 2, "alpha": 3}, "lokr") for name in ("llama", "opt", "bert", "t5", "bart")),
    ("LoKrConfig", "llama", {"r": 1, "decompose_both": True, "decompose_factor": 4}, "lokr"),
    ("LoKrConfig", "llama", {"r": 40, "target_modules": "all-linear"}, "lokr"),
    *(
        ("AdaLoraConfig", name, {"init_r": 4, "lora_alpha": 6, "total_step": 10}, "adalora")
        for name in ("llama", "gpt2", "gpt_neox", "phi3", "bert", "t5", "bart", "mamba")
    ),
    *(
        ("LoHaConfig", name, {"r": 2, "alpha": 3}, "lokr")
        for name in ("llama", "gpt_neox", "phi3", "bert", "t5")
    ),
]


@pytest.mark.parametrize(
    ("config", "name", "options", "use"), METHODS, ids=[f"{m[3]}-{m[1]}-{i}" for i, m in enumerate(METHODS)]
)
def test_other_methods_there_and_back(
    config: str, name: str, options: dict[str, Any], use: str, tmp_path: Path
) -> None:
    import peft

    usual = {"target_modules": MODULES[name]} | ({"fan_in_fan_out": True} if name == "gpt2" else {})
    known = vars(getattr(peft, config)).get("__dataclass_fields__", {})
    told = {key: value for key, value in usual.items() if key in known} | options
    model = theirs(name, tmp_path / "theirs", getattr(peft, config)(**told))
    stack = import_peft(tmp_path / "theirs", model=tiny(name))
    assert list(stack.plugins) == [use]
    assert apart(logits(stack.model), logits(model)) <= 2e-6
    assert apart(logits(tiny(name)), logits(model)) > 1e-4
    to_peft(stack, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
    assert apart(logits(again), logits(model)) <= 2e-6
    saved = [load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours")]
    assert {n: t.shape for n, t in saved[0].items()} == {n: t.shape for n, t in saved[1].items()}


def test_ranks_that_fell_there_and_back(tmp_path: Path) -> None:
    """Trained and pruned by PEFT, to no rank at all in some matrices."""
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    options = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 9, "lora_alpha": 7}
    model = get_peft_model(
        tiny("llama"), AdaLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    )
    optimizer, ids = torch.optim.Adam(model.parameters(), lr=0.05), torch.tensor([[3, 7, 5, 9, 2]])
    for step in range(9):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "theirs")
    ranks = {n: len(t) for n, t in load_file(tmp_path / "theirs" / WEIGHTS).items() if n.endswith("lora_E")}
    assert min(ranks.values()) == 0 < max(ranks.values())
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs").eval()
    stack = import_peft(tmp_path / "theirs", model=tiny("llama"))
    assert apart(logits(stack.model), logits(again)) <= 1e-6
    assert apart(logits(tiny("llama")), logits(again)) > 1e-3
    assert [phase.name for phase in stack.plugins["adalora"].phases()] == ["final"]
    to_peft(stack, tmp_path / "ours")
    third = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    assert apart(logits(third), logits(again)) <= 1e-6


PROMPTS: list[tuple[str, str, dict[str, Any], str]] = [
    *(
        ("PromptTuningConfig", name, {}, "prompt-tuning")
        for name in ("llama", "gpt2", "gpt_neox", "opt", "gemma2", "qwen2", "t5")
    ),
    *(
        ("PromptEncoderConfig", name, {"encoder_hidden_size": 5}, "p-tuning")
        for name in ("llama", "gpt2", "opt", "t5")
    ),
    (
        "PromptEncoderConfig",
        "llama",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5, "encoder_num_layers": 1},
        "p-tuning",
    ),
    *(
        ("PrefixTuningConfig", name, {}, "prefix-tuning")
        for name in ("llama", "gpt2", "gpt_neox", "qwen2", "opt", "gemma2", "phi3")
    ),
    ("PrefixTuningConfig", "llama", {"prefix_projection": True, "encoder_hidden_size": 6}, "prefix-tuning"),
]


@pytest.mark.parametrize(
    ("config", "name", "options", "use"), PROMPTS, ids=[f"{m[3]}-{m[1]}-{i}" for i, m in enumerate(PROMPTS)]
)
def test_soft_prompts_there_and_back(
    config: str, name: str, options: dict[str, Any], use: str, tmp_path: Path
) -> None:
    import peft

    def answer(model: Any) -> Tensor:
        inputs = example_inputs(tiny(name), padding="right")
        with torch.no_grad():
            found: Tensor = model.eval()(**inputs).logits
        real = inputs["attention_mask"].bool()
        if "decoder_input_ids" in inputs:
            return found
        return found[:, -real.shape[1] :][real]  # PEFT gives those of soft tokens as well

    torch.manual_seed(3)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    model = peft.get_peft_model(
        tiny(name), getattr(peft, config)(task_type=task, num_virtual_tokens=3, **options)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(tmp_path / "theirs")
    stack = import_peft(tmp_path / "theirs", model=tiny(name))
    assert list(stack.plugins) == [use]
    assert apart(answer(stack.model), answer(model)) <= 2e-6
    assert apart(answer(tiny(name)), answer(model)) > 1e-3
    to_peft(stack, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours")
    assert apart(answer(again), answer(model)) <= 2e-6


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_some_roles_of_a_fused_matrix(name: str, tmp_path: Path) -> None:
    """Rows that no role adapts stay as they are in PEFT: a gain of one, a length of |W|."""
    from peft import PeftModel

    from peftx_dora import Dora
    from peftx_ia3 import Ia3

    plugins = (Ia3(targets="attention.k,v", inputs=None), Dora(rank=2, targets="attention.q,v"))
    for number, plugin in enumerate(plugins):
        torch.manual_seed(0)
        stack = Stack(tiny(name), [plugin])
        for parameter in stack.ledger.parameters(next(iter(stack.plugins))):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        to_peft(stack, tmp_path / str(number))
        again = PeftModel.from_pretrained(tiny(name), tmp_path / str(number)).eval()
        assert apart(logits(again), logits(stack.model)) <= 2e-6


def changed(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), "utf-8")


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kasa_config": {"beta": 1}}, "settings that 'lora' does not know: kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "POLY"}, r"an adapter of POLY, which no installed plugin computes"),
        ({"brand_new": 3}, "brand_new=3"),
    ],
)
def test_a_setting_that_nobody_honours_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs("llama", tmp_path)
    changed(tmp_path, **fields)
    with pytest.raises((PeftxError, RegistryError), match=message):
        import_peft(tmp_path, model=tiny("llama"))


def test_keys_too_many_or_too_few_or_of_another_size_are_named(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    strange = {"base_model.model.x.lora_C.weight": torch.zeros(1)}
    cases: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda t: t.pop(key), "has no lora_B.weight for model.layers.0.self_attn.q_proj"),
        (lambda t: t.update(strange), r"has x\.lora_C\.weight, which 'lora' does not compute"),
        (
            lambda t: t.update({"base_model.model.x.weight": torch.zeros(1)}),
            "have no place in the model, e.g. .*x.weight",
        ),
        (lambda t: t.update({key: torch.zeros(7, 4)}), "is 7x4, which does not go with the model's 32x4"),
    ]
    for number, (change, message) in enumerate(cases):
        folder = tmp_path / str(number)
        theirs("llama", folder)
        rewritten(folder, change)
        model = tiny("llama")
        before = logits(model)
        with pytest.raises(PeftxError, match=message):
            import_peft(folder, model=model)
        assert torch.equal(logits(tiny("llama")), before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whisper", {"target_modules": ["q_proj", "conv1"]}, r"a convolution, model\.encoder\.conv1 \(4x8x3\)"),
        ("whisper", {"target_modules": ["q_proj", "conv1"], "use_dora": True}, "a convolution, model.encoder.conv1"),
        ("vit", {"target_modules": ["q_proj", "projection"]}, r"projection \(4x3x8x8\)"),
    ],
)  # fmt: skip
def test_places_that_no_plugin_adapts_are_named(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """And not taken for those of another model; known without the model."""
    theirs(name, tmp_path, **options)
    with pytest.raises(AdapterError, match=message):
        entries(read_adapter(tmp_path), Registry())


def test_a_convolution_of_another_method_is_named(tmp_path: Path) -> None:
    from peft import IA3Config

    theirs("vit", tmp_path, IA3Config(target_modules=["projection"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="a convolution"):
        entries(read_adapter(tmp_path), Registry())


def test_another_model_and_damaged_files(tmp_path: Path) -> None:
    theirs("llama", tmp_path / "a")
    with pytest.raises(PeftxError, match="matches nothing in this model"):
        import_peft(tmp_path / "a", model=tiny("gpt2"))
    changed(tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(PeftxError, match="does not say which model it is for"):
        import_peft(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"\xff" * 20)
    with pytest.raises(BundleError, match="corrupted"):
        import_peft(tmp_path / "a", model=tiny("llama"))
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="has no adapter_model"):
        import_peft(tmp_path / "a", model=tiny("llama"))
    (tmp_path / "a" / CONFIG).write_text("[]", "utf-8")
    with pytest.raises(BundleError, match="holds no settings"):
        import_peft(tmp_path / "a", model=tiny("llama"))


def test_what_peft_cannot_say_is_refused(tmp_path: Path) -> None:
    from peftx_propulsion import Propulsion

    with pytest.raises(PeftxError, match="propulsion: PEFT has no format for it"):
        to_peft(Stack(tiny("llama"), [Propulsion()]), tmp_path)
    with pytest.raises(PeftxError, match="holds one adapter, and the stack has 'lora', 'propulsion'"):
        to_peft(Stack(tiny("llama"), [Lora(rank=2), Propulsion()]), tmp_path)
    with pytest.raises(PeftxError, match="holds one adapter, and the stack has none"):
        to_peft(Stack(tiny("llama"), [FullFinetuning(targets="norm")]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_was_folded_in_is_refused(tmp_path: Path) -> None:
    """Not written as an adapter without numbers."""
    from peftx_nf4 import NF4Storage

    stack = Stack("peftx:tiny", [Lora(rank=2), NF4Storage()])
    stack.compress()
    with pytest.raises(AdapterError, match="lora: nothing of it is beside the weights any more"):
        to_peft(stack, tmp_path / "adapter", id="lora")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "abc"},
        {"lora_alpha": [1]},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"(": 1}},
        {"task_type": ["a"]},
        {"target_parameters": [5]},
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_kind_is_an_error_of_the_adapter(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    """In a spec too, where nothing but the names and shapes of tensors is read."""
    theirs("llama", tmp_path)
    changed(tmp_path, **fields)
    with pytest.raises(BundleError, match=r"has a setting or a tensor that PEFT does not write"):
        Registry().adapter(str(tmp_path))


def test_a_header_that_lies_is_an_error_of_the_adapter(tmp_path: Path) -> None:
    theirs("llama", tmp_path)
    for header in (
        b'{"a": {"shape": [1e999]}}',
        b'{"a": {"shape": {"b": 1}}}',
        b'{"a": 1}',
        b"[]",
        b"[" * 99999,
    ):
        (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(BundleError, match="is corrupted"):
            Registry().adapter(str(tmp_path))
    rewritten_scalar = {"base_model.model.model.norm.lora_A.weight": torch.tensor(1.0)}
    save_file(rewritten_scalar, tmp_path / WEIGHTS)
    with pytest.raises(BundleError, match="does not write"):
        Registry().adapter(str(tmp_path))


def test_a_module_of_its_own_that_the_model_shares(tmp_path: Path) -> None:
    """PEFT's copy of Gemma's embedding leaves the head as it was, ours would not."""
    from peft import PeftModel

    theirs("gemma2", tmp_path / "theirs", modules_to_save=["embed_tokens"])
    with pytest.raises(PeftxError, match=r"has a model.embed_tokens.weight of its own, which lm_head.weight"):
        import_peft(tmp_path / "theirs", model=tiny("gemma2"))
    stack = Stack(tiny("gemma2"), [Lora(rank=2), FullFinetuning(targets="embedding")])
    for parameter in stack.ledger.parameters("full-finetuning"):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    to_peft(stack, tmp_path / "ours", id="lora")
    again = PeftModel.from_pretrained(tiny("gemma2"), tmp_path / "ours").eval()
    assert apart(logits(again), logits(stack.model)) <= 2e-6
    back = import_peft(tmp_path / "ours", model=tiny("gemma2"))
    assert apart(logits(back.model), logits(stack.model)) <= 2e-6


def test_a_bias_that_boft_scales_past_is_refused(tmp_path: Path) -> None:
    from peft import BOFTConfig

    theirs("opt", tmp_path, BOFTConfig(boft_block_size=4, target_modules=["q_proj"], bias="boft_only"))
    with pytest.raises(PeftxError, match="trained biases as well"):
        import_peft(tmp_path, model=tiny("opt"))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    """And one that holds an adapter is replaced whole."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years", "utf-8")
    stack = Stack(tiny("llama"), [Lora(rank=2, targets="attention.q")])
    with pytest.raises(BundleError, match=r"holds no adapter_config\.json, so it is not overwritten"):
        to_peft(stack, tmp_path / "work")
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["thesis.txt"]
    for _ in range(2):
        to_peft(stack, tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {CONFIG, WEIGHTS}
