"""Loading a config: what is accepted, what each kind of mistake says, where values come from."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.config import FineTuningConfig, LoadedConfig, load_config
from llmforge.config.lora_schema import LoraConfig
from llmforge.config.old_keys import OLD_KEYS
from llmforge.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
MINIMAL = "model_id: org/model\ntrain_path: train.jsonl\n"
MODEL_AND_DATA = {"model_id": "org/model", "train_path": "train.jsonl"}
TEMPLATES = """\
generation_config:
  prompt_format:
    system: "{instruction}"
    user: "{instruction}"
    assistant: "{instruction}"
    trailing_assistant: ""
"""


class Loader:
    """Writes YAML to a file and loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str, *overrides: str, default_mode: bool = False) -> LoadedConfig:
        self.path.write_text(text, encoding="utf-8")
        return load_config(self.path, overrides, default_mode)

    def fails(self, text: str, *overrides: str, default_mode: bool = False) -> list[str]:
        """Return the lines of the error, without the path of the file."""
        with pytest.raises(ConfigError) as caught:
            self(text, *overrides, default_mode=default_mode)
        assert "pydantic" not in str(caught.value)
        assert "Input should" not in str(caught.value)
        return str(caught.value).replace(str(self.path), "c.yaml").split("\n")


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path / "c.yaml")


# --- what is accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_shaped_like_published_ones_load(file: Path) -> None:
    assert load_config(file).config.model_id.startswith("example-org/")


def test_values_of_published_shapes() -> None:
    full = load_config(CONFIGS / "full_parameter.yaml").config
    assert full.learning_rate == 5e-6
    assert full.trainer_resources == {"memory": 37_580_963_840}
    assert isinstance(full.trainer_resources["memory"], int)
    assert full.worker_resources == {"anyscale/accelerator_shape:4xA10G": 0.001, "g5.12xlarge": 1}
    assert full.deepspeed is not None
    assert full.deepspeed.config_path == "deepspeed_configs/zero_3.json"

    lora = load_config(CONFIGS / "lora_wandb.yaml").config
    assert lora.lora_config is not None
    assert lora.lora_config.target_modules == ("q_proj", "v_proj", "gate_proj", "embed_tokens", "lm_head")
    assert lora.lora_config.modules_to_save == ()
    assert lora.liger_kernel is not None
    assert lora.liger_kernel.kwargs.cross_entropy is False
    assert lora.liger_kernel.kwargs.swiglu is True

    preference = load_config(CONFIGS / "preference.yaml").config.preference_tuning_config
    assert preference is not None
    assert preference.logprob_processor_scaling_config is not None
    assert preference.logprob_processor_scaling_config.concurrency == (2, 4)

    guard = load_config(CONFIGS / "guard.yaml").config
    assert guard.train_path == "s3://example-data/guard/train.jsonl"
    assert guard.generation_config.stopping_tokens == (128009,)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e-4", 1.5e-4), (".5", 0.5), ("1", 1.0), ("0.000_1", 1e-4), ("1.e-3", 1e-3)],
)
def test_numbers_as_people_write_them(load: Loader, written: str, value: float) -> None:
    assert load(MINIMAL + f"learning_rate: {written}\n").config.learning_rate == value


def test_large_numbers_with_underscores(load: Loader) -> None:
    resources = load(
        MINIMAL + "trainer_resources: {memory: 37_580_963_840, custom: 1_000.5}\n"
    ).config.trainer_resources
    assert resources == {"memory": 37580963840, "custom": 1000.5}


def test_null_means_unset_for_every_key(load: Loader) -> None:
    keys = [key for key in FineTuningConfig.model_fields if key not in ("model_id", "train_path")]
    loaded = load(MINIMAL + "".join(f"{key}: null\n" for key in keys))
    assert loaded.config == load(MINIMAL).config
    assert load(MINIMAL + "lora_config: {r: null, lora_alpha: ~}\n").config.lora_config is not None


def test_config_is_frozen(load: Loader) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).config.seed = 3  # type: ignore[misc]


def test_anchors_and_merge_keys(load: Loader) -> None:
    text = MINIMAL + "worker_resources: &r {a: 1, b: 2}\ntrainer_resources: {<<: *r, b: 3}\n"
    assert load(text).config.trainer_resources == {"a": 1, "b": 3}


# --- unreadable files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "empty"),
        ("# nothing\n", 1, "empty"),
        ("- a\n- b\n", 1, "given a list at the top level"),
        ("just text\n", 1, "given a single value at the top level"),
        ("model_id: a\nlora_config:\n\tr: 8\n", 3, "tab"),
        ("model_id: a\nlora_config: {r: 8\n", 3, "never closed"),
        ("model_id: 'a\n", 2, "never closed"),
        ("model_id: a: b\n", 1, "quotes around a value that contains"),
        ("model_id: a\ntrain_path: *.jsonl\n", 2, "needs quotes"),
        ("model_id: a\n---\nmodel_id: b\n", 2, "several YAML documents"),
        ("model_id: a\nlora_config:\n    r: 8\n  bias: none\n", 4, "indented differently"),
        ("model_id: a\ntrain_path\nseed: 1\n", 3, "key without `:`"),
        ("model_id: a\x07\n", 1, "not allowed in YAML"),
    ],
)
def test_files_that_are_no_config(load: Loader, text: str, line: int, says: str) -> None:
    (message,) = load.fails(text)
    assert message.startswith(f"c.yaml:{line}: ")
    assert says in message


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="this is a directory"):
        load_config(tmp_path)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"model_id: a\ntrain_path: caf\xe9.jsonl\n")
    with pytest.raises(ConfigError, match="0xe9 is not UTF-8") as caught:
        load_config(path)
    assert caught.value.line == 2


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel_id: a\r\ntrain_path: b\r\nseed: 3\r\n")
    loaded = load_config(path)
    assert loaded.config.seed == 3
    assert loaded.origins["seed"].line == 3


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!!python/name:os.system", "!local", "!!binary", "!!set"])
def test_yaml_never_builds_objects(load: Loader, tag: str) -> None:
    value = "{a}" if tag == "!!set" else "x"
    (message,) = load.fails(MINIMAL + f"custom_model_tag: {tag} {value}\n")
    assert message.startswith("c.yaml:3: the tag ")


def test_aliases_cannot_blow_up(load: Loader) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "too many values" in load.fails("\n".join(levels) + "\n")[0]
    assert "contains itself" in load.fails("a: &a [*a]\n")[0]
    assert "nested too deeply" in load.fails("a: " + "[" * 5000 + "]" * 5000)[0]


# --- wrong keys and values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epohcs: 3", "num_epohcs: unknown key at the top level; did you mean num_epochs?"),
        ("learning-rate: 1", "learning-rate: unknown key at the top level; did you mean learning_rate?"),
        ("lora_config: {rank: 8}", "lora_config.rank: unknown key in lora_config; did you mean r?"),
        (
            "lora_config: {lora_droput: 0}",
            "lora_config.lora_droput: unknown key in lora_config; did you mean lora_dropout?",
        ),
        ("max_seq_length: 8", "max_seq_length: unknown key at the top level; did you mean context_length?"),
        ("lora_alpha: 8", "lora_alpha: unknown key at the top level; it is a key in lora_config; move it there"),
        (
            "lora_config: {seed: 8}",
            "lora_config.seed: unknown key in lora_config; it is a key at the top level; move it there",
        ),
        ("num_epochs: '3'", 'num_epochs: given "3"; allowed a whole number of at least 1; remove the quotes'),
        ("num_epochs: true", "num_epochs: given true; allowed a whole number of at least 1; change it"),
        ("num_epochs: 2.5", "num_epochs: given 2.5; allowed a whole number of at least 1; change it"),
        ("context_length: 0", "context_length: given 0; allowed a whole number of at least 1; change it"),
        ("context_length: 4e3", "context_length: given 4000.0; allowed a whole number of at least 1; write 4000"),
        ("num_warmup_steps: -1", "num_warmup_steps: given -1; allowed a whole number of at least 0; change it"),
        ("learning_rate: .nan", "learning_rate: given nan; allowed a number above 0 and at most 1; change it"),
        (
            "learning_rate: '1e-4'",
            'learning_rate: given "1e-4"; allowed a number above 0 and at most 1; remove the quotes',
        ),
        ("dtype: fp23", 'dtype: given "fp23"; allowed one of "bf16", "fp32"; did you mean fp32?'),
        ("eval_first: 1", "eval_first: given 1; allowed true or false; change it"),
        ("eval_first: 'true'", 'eval_first: given "true"; allowed true or false; remove the quotes'),
        ("packing: maybe", 'packing: given "maybe"; allowed "auto" or true or false; change it'),
        ("custom_model_tag: 2024", "custom_model_tag: given 2024; allowed a text; put quotes around it"),
        ("lora_config: 8", "lora_config: given 8; allowed a section with the keys r, lora_alpha, "),
        (
            "lora_config: {target_modules: [q, 3]}",
            "lora_config.target_modules[1]: given 3; allowed a text; put quotes around it",
        ),
        (
            "valid_path: []",
            "valid_path: given an empty list; allowed a path or address or a list, each a path or address",
        ),
        ("initial_base_model_ckpt_path: {repo: a}", "initial_base_model_ckpt_path.repo: unknown key"),
        ("logger: {provider: wandv}", 'logger.provider: given "wandv"; allowed one of "wandb"'),
        (
            "classifier_config: {label_tokens: [a]}",
            "classifier_config.label_tokens: given a list of 1; allowed a list, each a text",
        ),
        (
            "classifier_config: {label_tokens: [yes, no]}",
            "classifier_config.label_tokens[0]: given true; allowed a text; put quotes",
        ),
        ("deepspeed: {}", "deepspeed.config_path: missing; allowed a path or address; add it"),
        ("worker_resources: {a: b}", 'worker_resources.a: given "b"; allowed a number of at least 0; change it'),
    ],
)
def test_wrong_keys_and_values(load: Loader, text: str, message: str) -> None:
    assert any(line.startswith(f"c.yaml:3: {message}") for line in load.fails(MINIMAL + text + "\n"))


def test_required_keys(load: Loader) -> None:
    lines = load.fails("seed: 1\n")
    assert [line.split(";")[0] for line in lines] == ["c.yaml: model_id: missing", "c.yaml: train_path: missing"]
    assert "model_id" in load.fails("train_path: a\nmodel_id: null\n")[0]


def test_all_problems_are_reported_together_in_the_order_of_the_file(load: Loader) -> None:
    text = MINIMAL + "seed: x\nfoo: 1\nquantization: 4bit\nlora_config: null\ndtype: int4\n"
    lines = load.fails(text)
    assert [re.match(r"c.yaml:(\d+): (\w+)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        ("3", "seed"),
        ("4", "foo"),
        ("5", "quantization"),
        ("7", "dtype"),
    ]
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.line == 3
    assert caught.value.file == str(load.path)


def test_problems_inside_a_section_do_not_hide_problems_across_sections(load: Loader) -> None:
    text = TEMPLATES.replace('user: "{instruction}"', 'user: "{instruction}"\n    system_in_user: true')
    lines = load.fails(MINIMAL + text + "quantization: 4bit\npadding: max_length\n")
    assert [line.split(": ")[1] for line in lines] == [
        "generation_config.prompt_format.user",
        "quantization",
        "padding",
    ]


def test_a_wrong_key_does_not_cause_follow_up_errors(load: Loader) -> None:
    assert len(load.fails(MINIMAL + "quantization: 4bit\nlora_config: {r: none}\n")) == 1


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("classifier_config: {label_tokens: [a, b]}\ntask: causal_lm", ("classifier_config", "task: line 4")),
        ("task: classification", ("task", "add classifier_config")),
        (
            "classifier_config: {label_tokens: [a, b]}\npreference_tuning_config: {}",
            ("classifier_config", "preference_tuning_config: line 4"),
        ),
        ("quantization: 4bit", ("quantization", "add lora_config")),
        ("initial_adapter_model_ckpt_path: a", ("initial_adapter_model_ckpt_path", "add lora_config")),
        ("packing: true\npadding: longest", ("packing", "padding: line 4")),
        ("padding: max_length", ("padding", "add context_length")),
        ("parallel: deepspeed", ("parallel", "add deepspeed")),
        ("parallel: ddp\ndeepspeed: {config_path: a}", ("parallel", "deepspeed: line 4")),
        ("eval_first: true", ("eval_first", "add valid_path")),
        ("columns: {prompt: q}", ("columns", "messages, tools")),
        ("data_format: alpaca\ncolumns: {prompt: q}", ("columns", "instruction, output", "data_format: line 3")),
        ("gradient_checkpointing: true\nno_gradient_checkpoint: true", ("no_gradient_checkpoint", "line 3")),
        (
            "checkpoint_and_evaluation_frequency: {unit: steps}\ncheckpoint_every_n_epochs: 2",
            ("checkpoint_every_n_epochs", "line 3"),
        ),
        ("min_update_steps: 10\nmin_num_update_steps: 20", ("min_num_update_steps", "line 3")),
        ("classifier_config: {label_tokens: [a, a]}", ("classifier_config.label_tokens", "given a more than once")),
        (
            "lora_config: {target_modules: all-linear, layers_to_transform: [1]}",
            ("lora_config.layers_to_transform", "as a list"),
        ),
    ],
)
def test_values_that_cannot_go_together(load: Loader, text: str, keys: tuple[str, ...]) -> None:
    (message,) = load.fails(MINIMAL + text + "\n")
    assert re.match(rf"c.yaml:\d: {re.escape(keys[0])}: ", message)
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (('user: "{instruction}"', 'user: "text"'), "user", "contains {instruction}"),
        (('user: "{instruction}"', 'user: "{instruction}"\n    system_in_user: true'), "user", "contains {system}"),
        (('    system: "{instruction}"\n', ""), "system", "missing"),
        (('    trailing_assistant: ""\n', ""), "trailing_assistant", "missing"),
        (('    trailing_assistant: ""', "    trailing_assistant:"), "trailing_assistant", "missing"),
        (
            ("trailing_assistant", "use_hf_chat_templates: true\n    trailing_assistant"),
            "use_hf_chat_templates",
            "alone",
        ),
        (("trailing_assistant", "chat_template: x\n    trailing_assistant"), "chat_template", "alone"),
    ],
)
def test_prompt_format_must_be_whole(load: Loader, change: tuple[str, str], key: str, says: str) -> None:
    (message,) = load.fails(MINIMAL + TEMPLATES.replace(*change))
    assert f"generation_config.prompt_format.{key}: " in message
    assert says in message


def test_prompt_format_has_three_forms(load: Loader) -> None:
    assert load(MINIMAL + TEMPLATES).config.generation_config.prompt_format is not None
    for form in ("use_hf_chat_templates: true", "chat_template: '{{ messages }}'"):
        assert load(MINIMAL + f"generation_config: {{prompt_format: {{{form}}}}}\n")
    both = "generation_config: {prompt_format: {use_hf_chat_templates: true, chat_template: x}}\n"
    assert "given both" in load.fails(MINIMAL + both)[0]
    assert "missing" in load.fails(MINIMAL + "generation_config: {prompt_format: {}}\n")[0]


def test_keys_written_twice(load: Loader) -> None:
    (message,) = load.fails(MINIMAL + "seed: 1\nseed: 2\n")
    assert message.startswith("c.yaml:4: seed: written twice, on lines 3 and 4")
    loaded = load(MINIMAL + "seed: 1\nseed: 1\n")
    assert loaded.notes == [f"{load.path}:4: seed is written twice with the same value (first on line 3)"]
    # Published files do this; nothing depends on which of the values counts.
    loaded = load(MINIMAL + "dataset_size_scaling_factor: 1\ndataset_size_scaling_factor: 2\n")
    assert "different values" in loaded.notes[0]


@pytest.mark.parametrize(
    ("text", "section"),
    [
        (re.sub(r"(?m)^ +", "", TEMPLATES), "generation_config"),
        (re.sub(r"(?m)^ +", "", TEMPLATES) + "stopping_sequences:\n- a\nseed: 1\n", "generation_config"),
        ("lora_config:\nr: 8\nlora_alpha: 16\ntarget_modules:\n- q_proj\nseed: 1\n", "lora_config"),
        ("deepspeed:\nconfig_path: a.json\n", "deepspeed"),
        ("worker_resources:\naccelerator_type:A10G: 0.001\n", "worker_resources"),
        ("logger:\nprovider: mlflow\nprovider_config:\ntracking_uri: a\n", "logger"),
        (
            "preference_tuning_config:\nbeta: 0.1\nlogprob_processor_scaling_config:\nconcurrency: 2\n",
            "preference_tuning_config",
        ),
    ],
)
def test_lost_indentation_is_recognised(load: Loader, text: str, section: str) -> None:
    (message,) = load.fails(MINIMAL + text)
    assert message.startswith(f"c.yaml:3: {section}: given nothing, followed by ")
    assert "indentation of the section was lost" in message
    assert "two spaces" in message


def test_misspelt_key_after_an_empty_mapping_is_just_misspelt(load: Loader) -> None:
    assert load.fails(MINIMAL + "worker_resources:\nnum_epohcs: 3\n") == [
        "c.yaml:4: num_epohcs: unknown key at the top level; did you mean num_epochs?"
    ]


KEYS = sorted({*FineTuningConfig.model_fields, *OLD_KEYS, *LoraConfig.model_fields, "prompt_format", "uri", "x"})
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["", "a", "auto", "8bit", "true", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(data=st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6))
def test_anything_loads_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(MODEL_AND_DATA | data), encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        assert all(line.startswith(str(path)) for line in str(error).splitlines())  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(text=st.text("abr:-_[]{}#&*!|>'\"%@`,? \n\t\\0é\x00\x85\u2028", max_size=60))
def test_any_text_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ConfigError):
        load_config(path)


# --- old keys ---------------------------------------------------------------------------------------------


def test_old_keys_are_translated(load: Loader) -> None:
    loaded = load(MINIMAL + "checkpoint_every_n_epochs: 5\nmin_num_update_steps: 7\nno_gradient_checkpoint: true\n")
    assert loaded.config.checkpoint_and_evaluation_frequency.frequency == 5
    assert loaded.config.min_update_steps == 7
    assert loaded.config.gradient_checkpointing is False
    assert len(loaded.notes) == 3
    assert loaded.origins["gradient_checkpointing"].line == 5


def test_max_num_checkpoints_is_spread_over_the_epochs(load: Loader) -> None:
    loaded = load(MINIMAL + "num_epochs: 10\nmax_num_checkpoints: 4\n")
    assert loaded.config.checkpoint_and_evaluation_frequency.frequency == 3  # after epochs 3, 6, 9
    assert load(MINIMAL + "max_num_checkpoints: 4\n").config.checkpoint_and_evaluation_frequency.frequency == 1


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("num_data_blocks_per_device: 32", "data_workers"),
        ("dataset_size_scaling_factor: 1000", "remove the key"),
        ("forward_checkpoint_config: {tag: a}", "output_dir"),
        ("webhook_config: {model_tag: a}", "logger"),
    ],
)
def test_old_keys_without_meaning_give_one_note(load: Loader, text: str, replacement: str) -> None:
    loaded = load(MINIMAL + text + "\n")
    assert loaded.config == load(MINIMAL).config
    (note,) = load(MINIMAL + text + "\n").notes
    assert note.startswith(f"{load.path}:3: ")
    assert "has no effect" in note
    assert replacement in note


def test_old_keys_are_still_checked(load: Loader) -> None:
    assert load.fails(MINIMAL + "no_gradient_checkpoint: 1\n") == [
        "c.yaml:3: no_gradient_checkpoint: given 1; allowed true or false; change it"
    ]
    assert "at least 1" in load.fails(MINIMAL + "checkpoint_every_n_epochs: 0\n")[0]


def test_min_update_steps_beside_num_epochs_is_noted(load: Loader) -> None:
    assert "has no effect" in load(MINIMAL + "num_epochs: 3\nmin_update_steps: 50\n").notes[0]


# --- overrides --------------------------------------------------------------------------------------------


def test_overrides(load: Loader) -> None:
    text = MINIMAL + "seed: 1\nlora_config: {r: 8}\n"
    config = load(text, "seed=2", "lora_config.r=16", "learning_rate=1e-4", "logger.provider=wandb").config
    assert config.seed == 2
    assert config.lora_config is not None
    assert config.lora_config.r == 16
    assert config.learning_rate == 1e-4
    assert config.logger is not None
    assert load(text, "lora_config=null").config.lora_config is None
    assert load(text, "lora_config=").config.lora_config is None
    assert load(MINIMAL, "seed=1").config.seed == 1
    assert load(MINIMAL, "train_path=[a.jsonl, b.jsonl]").config.train_path == ("a.jsonl", "b.jsonl")
    assert load(MINIMAL, "custom_model_tag=a=b").config.custom_model_tag == "a=b"
    assert load(MINIMAL, "train_path=hf://datasets/o/d").config.train_path == "hf://datasets/o/d"
    assert load(MINIMAL, "worker_resources.g5.12xlarge=1").config.worker_resources == {"g5.12xlarge": 1}
    assert load("seed: 1\n", "model_id=a", "train_path=b").config.model_id == "a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora_config.rank=8",
            "--set lora_config.rank=8: lora_config.rank: unknown key in lora_config; did you mean r?",
        ),
        ("seed=x", '--set seed=x: seed: given "x"; allowed a whole number of at least 0'),
        ("lora_confg.r=8", "--set lora_confg.r=8: lora_confg: unknown key at the top level; did you mean lora_config?"),
        ("seed.a=8", "--set seed.a=8: seed: given a mapping with a; allowed a whole number"),
        ("seed", "--set seed: given no key and value; allowed: key=value"),
        ("=3", "--set =3: given no key and value"),
        ("seed={", "--set seed={: not valid YAML"),
        ("seed=!!python/object:a {}", "--set seed=!!python/object:a {}: the tag"),
        ("no_gradient_checkpoint=3", "--set no_gradient_checkpoint=3: no_gradient_checkpoint: given 3"),
    ],
)
def test_wrong_overrides_name_the_override(load: Loader, override: str, message: str) -> None:
    (line,) = load.fails(MINIMAL, override)
    assert line.startswith(message)


def test_an_override_repairs_a_wrong_value(load: Loader) -> None:
    assert load(MINIMAL + "seed: x\n", "seed=3").config.seed == 3


# --- default mode -----------------------------------------------------------------------------------------


def test_default_mode_chooses_lora(load: Loader) -> None:
    loaded = load(MINIMAL + "num_epochs: 3\n", default_mode=True)
    assert loaded.config.lora_config is not None
    assert loaded.config.lora_config.r == 8
    assert loaded.config.lora_config.target_modules == "all-linear"
    assert loaded.origins["lora_config"].kind == "default"
    assert load(MINIMAL, "lora_config.r=4", default_mode=True).origins["lora_config.r"].kind == "override"


def test_default_mode_refuses_what_it_chooses(load: Loader) -> None:
    lines = load.fails(MINIMAL + "lora_config: {r: 4}\nseed: 3\n", default_mode=True)
    assert [line.split(":")[2].strip() for line in lines] == ["lora_config", "seed"]
    assert "drop --default" in lines[0]


# --- origins ----------------------------------------------------------------------------------------------


def test_every_value_knows_its_origin(load: Loader) -> None:
    loaded = load(MINIMAL + "lora_config:\n  r: 8\n  target_modules: [a]\n", "seed=3", "logger.provider=wandb")
    origins = loaded.origins
    assert set(FineTuningConfig.model_fields) <= set(origins)
    assert (origins["model_id"].kind, origins["model_id"].reason, origins["model_id"].line) == ("user", "c.yaml:1", 1)
    assert origins["lora_config.r"].line == 4
    assert (origins["seed"].kind, str(origins["seed"])) == ("override", "--set seed=3")
    assert origins["logger"].kind == origins["logger.provider"].kind == "override"
    assert str(origins["valid_path"]) == "not set"
    assert str(origins["optimizer"]) == "default"
    assert str(loaded.error("lora_config.target_modules", "no")) == f"{load.path}:5: lora_config.target_modules: no"
    assert str(loaded.error("seed", "no")) == "--set seed=3: seed: no"
    assert loaded.text.startswith("model_id")


# --- what it costs ----------------------------------------------------------------------------------------


def test_importing_config_loads_nothing_heavy() -> None:
    code = (
        "import sys; from llmforge.config import load_config; load_config(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'pyarrow', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONFIGS / "lora_wandb.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
