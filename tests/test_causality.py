"""Models that read ahead are refused, and modules that LoRA cannot adapt are left out of `all-linear`."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    LagunaConfig,
    Llama4TextConfig,
    MambaConfig,
    ProphetNetConfig,
    XLMConfig,
)

from conftest import CHATML_TEMPLATE, build_tokenizer
from llmforge.errors import ModelError
from llmforge.models.adapter import add_lora, describe_left_out, left_out
from llmforge.models.causality import check_causal
from tiny_runs import run_here

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ALL_LINEAR = {"r": 4, "target_modules": "all-linear"}


def build(config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def bert(**options: Any) -> Any:
    return build(BertConfig(vocab_size=512, **SMALL, **options))


def test_a_model_that_reads_ahead_is_refused_and_the_switch_is_named() -> None:
    with pytest.raises(ModelError, match=r"this bert model is not causal: .* set is_decoder: true in its config\.json"):
        check_causal(bert())
    check_causal(bert(is_decoder=True))
    xlm = {"vocab_size": 512, "emb_dim": 32, "n_layers": 2, "n_heads": 2}
    with pytest.raises(ModelError, match=r"this xlm model is not causal: .* set causal: true in its config\.json"):
        check_causal(build(XLMConfig(**xlm)))
    check_causal(build(XLMConfig(**xlm, causal=True)))


def test_a_model_whose_predictions_depend_on_the_length_of_the_row_is_refused() -> None:
    sizes = {"hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 2}
    model = build(ProphetNetConfig(vocab_size=512, **sizes, is_decoder=True, is_encoder_decoder=False, init_std=0.1))
    with pytest.raises(ModelError, match=r"this prophetnet model is not causal: .* how many tokens follow"):
        check_causal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_neither_hides_nor_invents_a_leak(dtype: torch.dtype) -> None:
    check_causal(bert(is_decoder=True, initializer_range=0.1).to(dtype))
    with pytest.raises(ModelError, match="is not causal"):
        check_causal(bert(initializer_range=0.1).to(dtype))


@pytest.mark.parametrize("never", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_token_that_is_never_said_does_not_hide_a_leak(never: float) -> None:
    for is_decoder in (True, False):
        model = bert(is_decoder=is_decoder)
        with torch.no_grad():
            model.get_output_embeddings().bias[7] = never
        if is_decoder:
            check_causal(model)
        else:
            with pytest.raises(ModelError, match="is not causal"):
                check_causal(model)


def test_the_check_leaves_modes_and_random_state_alone() -> None:
    model = bert(is_decoder=True).train()
    model.bert.encoder.layer[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    check_causal(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_on_a_model_that_reads_ahead_ends_before_its_first_step(data_dir: Path) -> None:
    directory = data_dir / "bert"
    bert().save_pretrained(directory)
    build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE).save_pretrained(directory)
    with pytest.raises(ModelError, match="is not causal"):
        run_here(data_dir, directory)


def llama4() -> Any:
    return build(
        Llama4TextConfig(
            vocab_size=512, **SMALL, num_key_value_heads=2, head_dim=16, intermediate_size_mlp=64, num_local_experts=2
        )
    )


def test_routers_stay_out_of_all_linear() -> None:
    model = llama4()
    found = left_out(model, ALL_LINEAR)
    assert {name.rpartition(".")[2] for name in found} == {"router"}
    assert "router (" in str(describe_left_out(found))
    adapted = add_lora(model, ALL_LINEAR)
    ids_BT = torch.arange(20, 36).reshape(2, 8)
    adapted(input_ids=ids_BT, labels=ids_BT).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(".q_proj." in name for name in trained)
    assert not any(".router." in name for name in trained)


def test_layers_that_a_kernel_bypasses_stay_out_of_all_linear() -> None:
    model = build(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4))
    found = left_out(model, ALL_LINEAR)
    assert "out_proj" in {name.rpartition(".")[2] for name in found}
    adapted = add_lora(model, ALL_LINEAR)
    trained = {name.split(".")[-4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert "in_proj" in trained
    assert "out_proj" not in trained


def laguna() -> Any:
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 2}
    experts = {"shared_expert_intermediate_size": 16, "num_experts_per_tok": 1, "mlp_layer_types": ["dense", "sparse"]}
    return build(LagunaConfig(vocab_size=512, **{**SMALL, **sizes, **experts}))


def test_adapters_that_would_be_lost_on_loading_stay_out_of_all_linear(tmp_path: Path) -> None:
    model = laguna()
    found = left_out(model, ALL_LINEAR)
    assert {name.rpartition(".")[0] for name in found} == {"model.layers.1.mlp.shared_experts"}
    # The reason is true of PEFT: else the module need not be left out any more.
    adapted = peft.get_peft_model(laguna(), peft.LoraConfig(**ALL_LINEAR, init_lora_weights=False))
    for parameter in adapted.parameters():
        parameter.data += float(parameter.requires_grad)
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(laguna(), tmp_path)
    before, after = adapted.state_dict(), loaded.state_dict()
    lost = {name.partition(".lora_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert lost == {f"base_model.model.{name}" for name in found}

    with pytest.raises(
        ModelError, match=r"PEFT would not find the adapter of up_proj again .*exclude_modules: \[\"model"
    ):
        add_lora(laguna(), {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    assert add_lora(model, ALL_LINEAR).peft_config["default"].exclude_modules == set(found)


def test_what_the_user_excludes_stays_excluded() -> None:
    for given in (["q_proj"], r".*\.q_proj"):
        adapted = add_lora(llama4(), {**ALL_LINEAR, "exclude_modules": given})
        trained = {name.split(".")[-4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert "k_proj" in trained
        assert not trained & {"q_proj", "router"}


def test_nothing_is_left_out_where_every_layer_is_called(model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert left_out(model, ALL_LINEAR) == {}
    assert describe_left_out({}) is None
    assert add_lora(model, ALL_LINEAR).peft_config["default"].exclude_modules is None
