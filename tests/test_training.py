"""Training: the same steps however they are cut, the same losses as ever, and a model that learns."""

import gc
import json
import math
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import QUESTIONS, build_model, conversation_rows, save_model, write_jsonl
from llmforge.config import load_config
from llmforge.data.batches import StepPlan
from llmforge.data.packing import cut_into_packs
from llmforge.data.samples import Sample
from llmforge.errors import ConfigError, ModelError, NonFiniteLossError, RunError
from llmforge.jobs.events import read_events
from llmforge.jobs.finetune import finetune
from llmforge.models.adapter import add_lora
from llmforge.models.head import find_head
from llmforge.models.isolation import isolate
from llmforge.models.load import enable_activation_checkpointing
from llmforge.tasks import InstructionTuning
from llmforge.train import rehearsal
from llmforge.train import run as run_module
from llmforge.train.backends import SingleDevice
from llmforge.train.loop import train
from llmforge.train.optimization import build_optimizer, build_schedule
from tiny_runs import COLOURS, LORA, Listener, command, run_here, write_config

GOLDEN = Path(__file__).parent / "golden"
EMBEDDING_LORA = {"r": 8, "lora_alpha": 16, "target_modules": [*LORA["target_modules"], "embed_tokens", "lm_head"]}


# --- the same steps however they are cut ------------------------------------------------------------------------------


def train_in_float64(
    micro_batch: int,
    accumulation: int,
    *,
    lora: bool = False,
    pad_to: int | None = None,
    checkpointing: bool = False,
    pack_tokens: int | None = None,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Run 5 steps over 20 samples, the last step of the epoch being a partial one; give losses, norms and weights."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 24, (20,), generator=generator).tolist()
    data = [
        Sample(
            torch.randint(3, 97, (length,), generator=generator).tolist(),
            [0.0, *torch.rand(length - 1, generator=generator).gt(0.4).double().tolist()],
        )
        for length in lengths
    ]
    torch.manual_seed(0)
    model = build_model(97).double()
    if checkpointing:
        assert enable_activation_checkpointing(model) is None
    forwards: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    if lora:
        model = add_lora(model, LORA).double()
    task = InstructionTuning(0, pad_to)
    plan = StepPlan(lengths, micro_batch, accumulation, seed=3)
    assert plan.steps_per_epoch == 3  # 8 + 8 + 4 samples
    listener = Listener()
    head = None if pack_tokens is None else find_head(model)
    if pack_tokens is not None:
        assert isolate(model, find_head(model), torch.enable_grad).packs

    def micro_batches(step: int) -> list[Any]:
        if pack_tokens is None:
            return [task.collate([data[i] for i in batch]) for batch in plan.micro_batches(step)]
        packs = cut_into_packs(
            [data[i] for i in plan.samples(step)], share=False, wanted=pack_tokens, limit=pack_tokens
        )
        return [task.pack(part, share=False, fill_to=8) for part in packs]

    train(
        model,
        partial(task.loss, model, head=head),
        micro_batches=micro_batches,
        optimizer=build_optimizer("adamw", model.named_parameters(), weight_decay=0.1),
        schedule=build_schedule("cosine", learning_rate=1e-2, warmup_steps=1, total_steps=5),
        backend=SingleDevice(torch.device("cpu")),
        autocast=torch.enable_grad,
        reporter=listener,
        first_step=0,
        last_step=5,
        steps_per_epoch=3,
        max_grad_norm=1.0,
        seed=0,
        is_milestone=lambda step: False,
        milestone=lambda step: None,
        save=lambda step: None,
        settle=lambda: None,
        interrupted=lambda: False,
    )
    if pack_tokens is None:
        expected = sum(len(plan.micro_batches(step)) for step in range(5))
        assert len(forwards) == expected * (2 if checkpointing else 1)  # once more in the backward pass
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return listener.of("step", "train_loss"), listener.of("step", "grad_norm"), weights


@pytest.mark.parametrize("lora", [False, True])
def test_losses_norms_and_weights_do_not_depend_on_how_a_step_is_cut(lora: bool) -> None:
    losses, norms, weights = train_in_float64(8, 1, lora=lora)
    assert len(losses) == 5
    variants: list[dict[str, Any]] = [
        {"micro_batch": 4, "accumulation": 2},
        {"micro_batch": 1, "accumulation": 8},
        {"micro_batch": 8, "accumulation": 1, "pad_to": 40},
        {"micro_batch": 2, "accumulation": 4, "checkpointing": True},
        {"micro_batch": 8, "accumulation": 1, "pack_tokens": 1000},
        {"micro_batch": 2, "accumulation": 4, "pack_tokens": 30},
        {"micro_batch": 2, "accumulation": 4, "pack_tokens": 60, "checkpointing": True},
    ]
    for variant in variants:
        other_losses, other_norms, other_weights = train_in_float64(**variant, lora=lora)
        assert other_losses == pytest.approx(losses, abs=1e-9), variant
        assert other_norms == pytest.approx(norms, abs=1e-9), variant
        for name, weight in weights.items():
            # Adam's first updates divide by |gradient|: where that is tiny, rounding is magnified.
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-7, msg=f"{variant} {name}")


def losses_of(data_dir: Path, model: Path, **keys: Any) -> list[float]:
    return run_here(data_dir, model, **keys)[1].of("step", "train_loss")


def test_a_run_reports_the_same_losses_however_its_steps_are_cut(data_dir: Path, model_dir: Path) -> None:
    keys: dict[str, Any] = {"learning_rate": 1e-2, "num_epochs": 1}
    whole = losses_of(data_dir, model_dir, custom_model_tag="a", **keys)
    assert len(whole) == 6
    cuts: list[dict[str, Any]] = [
        {"train_batch_size_per_device": 4, "gradient_accumulation_steps": 2},
        {"train_batch_size_per_device": 1, "gradient_accumulation_steps": 8},
        {"padding": "max_length", "context_length": 64},
        {"gradient_checkpointing": True},
        {"packing": False},
        {"torch_compile_config": {"backend": "aot_eager"}},
    ]
    for number, cut in enumerate(cuts):
        other = losses_of(data_dir, model_dir, custom_model_tag=f"b{number}", **keys, **cut)
        assert other == pytest.approx(whole, rel=1e-4), cut


def test_what_needs_most_memory_is_tried_first_and_leaves_no_trace(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_here(data_dir, model_dir, custom_model_tag="plain", lora_config=LORA)[1]
    assert not [note for note in plain.notes if note.startswith("tried first")]  # a tiny model on a CPU
    monkeypatch.setattr(rehearsal, "_PLENTY", 0.0)
    run, tried = run_here(data_dir, model_dir, custom_model_tag="tried", lora_config=LORA)
    assert len([note for note in tried.notes if note.startswith("tried first")]) == 1
    assert tried.of("step", "train_loss") == plain.of("step", "train_loss")  # bitwise
    assert tried.of("step", "grad_norm") == plain.of("step", "grad_norm")
    assert sorted(path.name for path in (run.run_dir / "checkpoints").iterdir()) == ["step-000006"]


@pytest.mark.parametrize("message", ["out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_too_little_memory_shows_before_the_first_step_and_names_what_to_change(
    message: str, data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise (torch.OutOfMemoryError if message == "out of memory" else RuntimeError)(message)

    monkeypatch.setattr(rehearsal, "_PLENTY", 0.0)
    monkeypatch.setattr(SingleDevice, "backward", fails)
    with pytest.raises(RunError, match=r"train_batch_size_per_device 8 and context_length 64.*gradient_checkpointing"):
        run_here(data_dir, model_dir)
    events = read_events(data_dir / "runs" / "run" / "events.jsonl")
    assert [event["event"] for event in events if event["event"] != "note"] == ["started", "failed"]


def test_the_trained_model_is_gone_when_the_proof_loads_the_artifact(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    alive: list[bool] = []
    isolate_, prove_ = run_module.isolate, run_module._prove

    def remember(model: Any, *arguments: Any) -> Any:
        models.append(weakref.ref(model))
        return isolate_(model, *arguments)

    def look(*arguments: Any) -> Any:
        gc.collect()
        alive.append(models[0]() is not None)
        return prove_(*arguments)

    monkeypatch.setattr(run_module, "isolate", remember)
    monkeypatch.setattr(run_module, "_prove", look)
    for lora in (None, LORA):
        models.clear()
        run_here(data_dir, model_dir, custom_model_tag=f"run{lora is None}", lora_config=lora)
    assert alive == [False, False]


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(data_dir: Path, model_dir: Path) -> None:
    config = transformers.BloomConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(model_dir).vocab_size, hidden_size=32, n_layer=2, n_head=2
    )
    shutil.copytree(model_dir, data_dir / "bloom")
    (data_dir / "bloom" / "model.safetensors").unlink()
    transformers.BloomForCausalLM(config).save_pretrained(data_dir / "bloom")
    _, listener = run_here(data_dir, data_dir / "bloom", custom_model_tag="auto")
    assert [note for note in listener.notes if note.startswith("packing is off: its attention cannot be exchanged")]
    with pytest.raises(ModelError, match=r"packing: given true, but in this bloom model"):
        run_here(data_dir, data_dir / "bloom", custom_model_tag="asked", packing=True)


def test_the_last_step_of_an_epoch_counts_its_own_examples(data_dir: Path, model_dir: Path) -> None:
    keys = {"train_batch_size_per_device": 4, "gradient_accumulation_steps": 5, "num_epochs": 2}
    _, listener = run_here(data_dir, model_dir, **keys)
    assert listener.of("step", "examples") == [20, 20, 8] * 2
    assert listener.of("step", "epoch") == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-4)
    rows = sum(listener.of("step", "tokens")[:3])
    assert rows == listener.of("started", "tokens")[0] == sum(listener.of("step", "tokens")[3:])
    assert sum(listener.of("step", "trained_tokens")[:3]) == listener.of("started", "trained_tokens")[0]


# --- the same losses as ever ------------------------------------------------------------------------------------------

GOLDEN_RUNS: dict[str, dict[str, Any]] = {
    "instruction_tuning_lora": {"lora_config": LORA, "learning_rate": 1e-2},
    "instruction_tuning_full": {"learning_rate": 1e-3},
    "causal_lm_full": {"task": "causal_lm", "learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_losses_are_the_golden_ones(name: str, data_dir: Path, model_dir: Path) -> None:
    """Changing a golden file needs a sentence in the commit. To write one anew: delete it and run this test."""
    losses = losses_of(data_dir, model_dir, valid_path=None, **GOLDEN_RUNS[name])
    golden = GOLDEN / f"{name}.txt"
    if not golden.exists():
        golden.write_text("".join(f"{loss:.9f}\n" for loss in losses))
        pytest.fail(f"{golden} was missing; it now holds this run's losses. Look at them, then run again")
    assert losses == pytest.approx([float(line) for line in golden.read_text().split()], rel=1e-4)


def test_bf16_losses_are_close_to_those_in_fp32(data_dir: Path, model_dir: Path) -> None:
    for lora in (None, LORA):
        keys = {"lora_config": lora, "learning_rate": 1e-3}
        tag = "lora" if lora else "full"
        fp32 = losses_of(data_dir, model_dir, custom_model_tag=f"{tag}32", **keys)
        bf16 = losses_of(data_dir, model_dir, custom_model_tag=f"{tag}16", **keys, dtype="bf16")
        assert bf16 == pytest.approx(fp32, rel=1e-2)
        assert bf16 != fp32


# --- it learns --------------------------------------------------------------------------------------------------------


def every_question() -> list[dict[str, Any]]:
    """Rows that ask for each colour in each wording."""
    rows = {json.dumps(row, sort_keys=True): row for row in conversation_rows(1000)}
    assert len(rows) == 24
    return [row for row in rows.values() for _ in range(4)]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_config": EMBEDDING_LORA, "learning_rate": 2e-2},
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-2, "task": "causal_lm", "num_epochs": 16},
    ],
    ids=["lora", "full", "causal_lm"],
)
def test_it_learns_and_answers(keys: dict[str, Any], data_dir: Path, model_dir: Path) -> None:
    write_jsonl(data_dir / "train.jsonl", every_question())
    run, listener = run_here(data_dir, model_dir, **{"num_epochs": 12, **keys})
    if keys.get("task") != "causal_lm":  # which question comes next cannot be learnt
        assert listener.of("step", "train_loss")[-1] < 0.02
    answers = run.generate([messages for messages, _ in COLOURS], max_new_tokens=8)
    assert answers == [answer for _, answer in COLOURS]


def test_it_learns_through_the_commands(data_dir: Path, model_dir: Path) -> None:
    write_jsonl(data_dir / "train.jsonl", every_question())
    config = write_config(data_dir, model_dir, lora_config=EMBEDDING_LORA, learning_rate=2e-2, num_epochs=10)
    trained = command("finetune", config, "--set", "num_epochs=12", "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert set(result) == {"run_dir", "artifact_dir", "tag", "metrics"}
    # Nothing of transformers, PEFT or torch leaks to the terminal.
    assert trained.stderr.startswith("note: The adapter cannot be served as it is: it adapts the embeddings")
    assert trained.stderr.count("\n") == 1

    asked = write_jsonl(data_dir / "asked.jsonl", [{"messages": messages} for messages, _ in COLOURS])
    answered = command(
        "generate", result["run_dir"], "--input", asked, "--output", data_dir / "answers.jsonl", "--max-new-tokens", 8
    )
    assert answered.returncode == 0, answered.stderr
    lines = [json.loads(line) for line in (data_dir / "answers.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in lines] == [answer for _, answer in COLOURS]
    assert answered.stderr.count("\n") == 1

    talked = command("chat", result["run_dir"], "--max-new-tokens", 8, stdin="What does red mean?\n/clear\nblue?\n")
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout.split() == [QUESTIONS["red"], QUESTIONS["blue"]]
    assert talked.stderr == ""


# --- evaluation and checkpoints ---------------------------------------------------------------------------------------


def steps_on_disk(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


def overfitting(data_dir: Path) -> None:
    """Give validation data that contradict the training data: the more is learnt, the worse it gets."""
    write_jsonl(data_dir / "train.jsonl", conversation_rows(24))
    wrong = conversation_rows(12, seed=1)
    for row in wrong:
        row["messages"][1]["content"] = {"stop": "wait", "wait": "stop"}.get(row["messages"][1]["content"], "stop")
    write_jsonl(data_dir / "valid.jsonl", wrong)


def test_the_artifact_is_the_best_checkpoint_not_the_last(data_dir: Path, model_dir: Path) -> None:
    overfitting(data_dir)
    keys = {"valid_path": str(data_dir / "valid.jsonl"), "learning_rate": 1e-2, "num_epochs": 8}
    run, listener = run_here(data_dir, model_dir, **keys, num_checkpoints_to_keep=2)
    losses = dict(zip(listener.of("evaluation", "step"), listener.of("evaluation", "eval_loss"), strict=True))
    ranked = sorted(losses, key=losses.__getitem__)
    best, last = ranked[0], max(losses)
    assert best != last
    assert listener.of("finished", "best_step") == [best]
    assert run.metrics == {"eval_loss": losses[best], "perplexity": pytest.approx(math.exp(losses[best]))}
    # The two best are kept, and the last two, from which the run could go on.
    assert steps_on_disk(run.run_dir) == sorted({*ranked[:2], last - 3, last})
    saved = load_file(run.artifact_dir / "model.safetensors")
    checkpoint = load_file(run.run_dir / "checkpoints" / f"step-{best:06d}" / "parameters.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in checkpoint.items())

    # Evaluating the artifact gives the loss that the run reported for it.
    _, again = run_here(
        data_dir, run.artifact_dir, **{**keys, "custom_model_tag": "again", "eval_first": True, "num_epochs": 1}
    )
    assert again.of("evaluation", "eval_loss")[0] == pytest.approx(losses[best], rel=1e-5)


def test_the_next_best_is_the_artifact_where_the_best_is_damaged(data_dir: Path, model_dir: Path) -> None:
    overfitting(data_dir)

    class Damaging(Listener):
        def event(self, event: str, **fields: Any) -> None:
            super().event(event, **fields)
            if event == "checkpoint" and fields["step"] == 24:
                losses = dict(zip(self.of("evaluation", "step"), self.of("evaluation", "eval_loss"), strict=True))
                self.ranked = sorted(losses, key=losses.__getitem__)
                file = Path(fields["path"]).parent / f"step-{self.ranked[0]:06d}" / "parameters.safetensors"
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)

    listener = Damaging()
    keys = {"valid_path": str(data_dir / "valid.jsonl"), "learning_rate": 1e-2, "num_epochs": 8}
    config = write_config(data_dir, model_dir, **keys, num_checkpoints_to_keep=2)
    run = finetune(load_config(config), listener)
    assert run is not None
    best, second, *_ = listener.ranked
    assert best != 24  # which the model holds at the end, and nobody reads
    assert listener.of("finished", "best_step") == [second]
    said = [note for note in listener.notes if f"step-{best:06d} is damaged" in note]
    assert len(said) == 1
    assert f"the artifact is made of step-{second:06d}" in said[0]
    saved = load_file(run.artifact_dir / "model.safetensors")
    checkpoint = load_file(run.run_dir / "checkpoints" / f"step-{second:06d}" / "parameters.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in checkpoint.items())


def test_without_validation_data_the_best_is_the_last(data_dir: Path, model_dir: Path) -> None:
    run, listener = run_here(data_dir, model_dir, num_epochs=3, num_checkpoints_to_keep=2)
    assert listener.of("finished", "best_step") == [18]
    assert steps_on_disk(run.run_dir) == [12, 18]
    assert listener.of("evaluation", "step") == []
    assert run.metrics == {}


@pytest.mark.parametrize(
    ("unit", "frequency", "expected"),
    [("steps", 4, [4, 8, 12]), ("steps", 5, [5, 10, 12]), ("epochs", 1, [6, 12]), ("epochs", 2, [12])],
)
def test_frequency_in_steps_and_epochs(
    unit: str, frequency: int, expected: list[int], data_dir: Path, model_dir: Path
) -> None:
    _, listener = run_here(
        data_dir,
        model_dir,
        valid_path=str(data_dir / "valid.jsonl"),
        num_epochs=2,
        checkpoint_and_evaluation_frequency={"unit": unit, "frequency": frequency},
        eval_first=True,
    )
    assert listener.of("evaluation", "step") == [0, *expected]
    assert listener.of("checkpoint", "step") == expected


def test_min_update_steps_gives_the_epochs(data_dir: Path, model_dir: Path) -> None:
    _, listener = run_here(data_dir, model_dir, num_epochs=None, min_update_steps=13)  # 6 steps an epoch
    assert listener.of("started", "epochs") == [3]
    assert listener.of("step", "step") == list(range(1, 19))


def test_the_learning_rate_warms_up_and_decays() -> None:
    cosine = build_schedule("cosine", learning_rate=1.0, warmup_steps=3, total_steps=9)
    rates = [cosine(step) for step in range(9)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[8] < rates[7] < rates[6]
    linear = build_schedule("linear", learning_rate=1.0, warmup_steps=0, total_steps=4)
    assert [linear(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    constant = build_schedule("constant", learning_rate=1.0, warmup_steps=1, total_steps=4)
    assert [constant(step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


# --- numbers that are none --------------------------------------------------------------------------------------------


def damaged_model(model_dir: Path, target: Path, value: float) -> Path:
    """Copy a model and write one bad number into its last norm."""
    shutil.copytree(model_dir, target)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_loss_that_is_no_number_stops_the_run_before_the_update(
    value: float, lora: Any, data_dir: Path, model_dir: Path
) -> None:
    model = damaged_model(model_dir, data_dir / "damaged", value)
    with pytest.raises(NonFiniteLossError, match=r"step 1; no checkpoint holds that update"):
        run_here(data_dir, model, lora_config=lora)
    events = read_events(data_dir / "runs" / "run" / "events.jsonl")
    assert [event["event"] for event in events if event["event"] != "note"] == ["started", "failed"]
    assert "step 1" in events[-1]["error"]
    assert not (data_dir / "runs" / "run" / "checkpoints").exists()


def test_a_run_that_explodes_keeps_its_last_good_checkpoint_and_exits_with_1(data_dir: Path, model_dir: Path) -> None:
    keys = {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 1e30,
        "lr_scheduler_type": "constant",
        "num_epochs": 40,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
    }
    done = command("finetune", write_config(data_dir, model_dir, **keys))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Lower learning_rate" in done.stderr
    run_dir = data_dir / "runs" / "run"
    events = read_events(run_dir / "events.jsonl")
    assert events[-1]["event"] == "failed"
    assert not (run_dir / "artifact").exists()
    last = max(event["step"] for event in events if event["event"] == "checkpoint")
    assert steps_on_disk(run_dir) == [last - 1, last]
    weights = load_file(run_dir / "checkpoints" / f"step-{last:06d}" / "parameters.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_validation_loss_that_is_no_number_is_never_the_best(data_dir: Path, model_dir: Path) -> None:
    model = damaged_model(model_dir, data_dir / "damaged", math.nan)
    with pytest.raises(NonFiniteLossError, match="validation data is nan"):
        run_here(data_dir, model, valid_path=str(data_dir / "valid.jsonl"), eval_first=True)


# --- what is refused before weights load ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 5}, "use max_new_tokens instead"),
        ({"temprature": 0.5}, "did you mean temperature"),
        ({"max_new_tokens": 0}, "must be greater than 0"),
        ({"num_beams": 4}, "one text"),
        ({"eos_token_id": 3}, "stopping_tokens"),
    ],
)
def test_generation_options_are_checked_before_training(
    options: dict[str, Any], words: str, data_dir: Path, model_dir: Path
) -> None:
    config = write_config(data_dir, model_dir, generation_config={"generate_kwargs": options})
    with pytest.raises(ConfigError, match=f"generate_kwargs: .*{words}"):
        finetune(load_config(config), Listener())
    assert not (data_dir / "runs").exists()


def test_weights_that_do_not_fit_their_config_are_refused(data_dir: Path, tmp_path: Path) -> None:
    from llmforge.errors import ModelError

    model = save_model(tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        run_here(data_dir, model)
