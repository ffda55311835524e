"""However a run is spread over devices, it is the same run: losses, weights, and the checkpoints to go on from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import conversation_rows, write_jsonl
from llmforge.checkpoint import Saved, list_checkpoints
from llmforge.data.batches import StepPlan
from ranks import reported, train_on_ranks
from tiny_runs import LORA, write_config

# One fixture trains all 63 runs: minutes on two cores. What hangs is found by the limit of each group of ranks.
pytestmark = pytest.mark.timeout(2400)

# Six steps an epoch of 8 examples; 12 steps, with an evaluation and a checkpoint after every fifth and the last.
SCHEDULE: dict[str, Any] = {
    "num_epochs": 2,
    "num_warmup_steps": 2,
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    "num_checkpoints_to_keep": 2,
    "learning_rate": 1e-3,
}
# What LLMForge recommended to adapt: embeddings, too.
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {**LORA, "target_modules": ADAPTED}},
    "full": {"weight_decay": 0.1},
}
OFFLOAD = {"device": "cpu", "pin_memory": True}
# What the DeepSpeed files that LLMForge published say of ZeRO, and stage 1.
ZERO: dict[str, dict[str, Any]] = {
    "zero_1": {"stage": 1},
    "zero_2": {"stage": 2, "round_robin_gradients": True, "offload_optimizer": OFFLOAD},
    "zero_3": {"stage": 3, "gather_16bit_weights_on_model_save": True, "round_robin_gradients": True},
    "zero_3_hpz_offload_optim+param": {
        "stage": 3,
        "zero_hpz_partition_size": 2,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
    },
}
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2", "fsdp_cpu_offload": True},
    **{name: {"deepspeed": {"config_path": f"{name}.json"}} for name in ZERO},
}
ONE = {"train_batch_size_per_device": 4, "gradient_accumulation_steps": 2}
TWO = {"num_devices": 2, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 2}


def deepspeed_config(zero: dict[str, Any]) -> dict[str, Any]:
    """Give a config in the shape that LLMForge's have."""
    return {
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            **zero,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 10,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parallel")
    # 44 rows: the last step of an epoch has four examples, fewer than the others.
    write_jsonl(directory / "train.jsonl", conversation_rows(44))
    write_jsonl(directory / "valid.jsonl", conversation_rows(11, seed=1))
    for name, zero in ZERO.items():
        (directory / f"{name}.json").write_text(json.dumps(deepspeed_config(zero)))
    return directory


@pytest.fixture(scope="module")
def trained(place: Path, model_dir: Path) -> Path:
    """Train everything: on one device; on two ranks with every backend, at once and interrupted; from one to the other.

    The processes start once, which takes longer than a run.
    """

    def config(name: str, *keys: dict[str, Any]) -> Path:
        merged = {key: value for part in keys for key, value in part.items()}
        valid = {"valid_path": str(place / "valid.jsonl"), "custom_model_tag": name}
        return write_config(place, model_dir, **{**SCHEDULE, **valid, **merged})

    one = {method: config(f"one-{method}", METHODS[method], ONE) for method in METHODS}
    two = {
        f"{backend}-{method}": config(f"{backend}-{method}", METHODS[method], TWO, keys)
        for backend, keys in BACKENDS.items()
        for method in METHODS
    }
    padded = config("padded", METHODS["full"], TWO, {"packing": False, "parallel": "fsdp2"})
    train_on_ranks(
        1,
        place / "meeting-1",
        [(path, place / f"one-{method}", None) for method, path in one.items()]
        + [(one["full"], place / f"to-{backend}", 6) for backend in BACKENDS],
    )
    train_on_ranks(
        2,
        place / "meeting-2",
        [(path, place / name, None) for name, path in two.items()]
        + [(path, place / f"{name}-cut", stop) for name, path in two.items() for stop in (7, None)]
        + [(padded, place / "padded", None)]
        + [(two[f"{backend}-full"], place / f"to-{backend}", None) for backend in BACKENDS]
        + [(two[f"{backend}-full"], place / f"from-{backend}", 6) for backend in BACKENDS],
    )
    train_on_ranks(
        1,
        place / "meeting-3",
        [(two[f"{backend}-full"], place / f"from-{backend}", None) for backend in BACKENDS],
    )
    return place


def weights(directory: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(path for name in names if (path := directory / "artifact" / name).exists()))


def difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def assert_same_run(one: Path, other: Path) -> None:
    for event, field in (("step", "train_loss"), ("step", "grad_norm"), ("evaluation", "eval_loss")):
        assert difference(reported(one, event, field), reported(other, event, field)) < 1e-5, field
    for field in ("examples", "tokens", "trained_tokens", "learning_rate"):
        assert reported(one, "step", field) == reported(other, "step", field)
    assert_close_weights(one, other)


def assert_close_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_train_what_one_device_trains(trained: Path, backend: str, method: str) -> None:
    assert_same_run(trained / f"one-{method}", trained / f"{backend}-{method}")
    devices = reported(trained / f"{backend}-{method}", "started", "devices")
    assert devices[0].startswith("2 × CPU")


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_whole_whatever_a_rank_holds(trained: Path, backend: str) -> None:
    found = weights(trained / f"{backend}-lora")
    assert len(found) == 2 * (2 * 7 + 2)  # A and B of seven modules in each of two layers, and of both embeddings
    assert all(tensor.norm() > 0 for tensor in found.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_comes_to_the_same_bytes(trained: Path, backend: str, method: str) -> None:
    whole, cut = trained / f"{backend}-{method}", trained / f"{backend}-{method}-cut"
    assert reported(cut, "started", "resumed_from") == [7]
    assert reported(cut, "step", "train_loss") == reported(whole, "step", "train_loss")[7:]
    first, second = weights(whole), weights(cut)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    last, other = (Saved(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, cut))
    assert last.shapes == other.shapes
    for name, shape in last.shapes.items():
        mine, theirs = torch.empty(shape), torch.empty(shape)
        last.read({name: mine})
        other.read({name: theirs})
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_moves_to_another_number_of_devices(trained: Path, backend: str) -> None:
    """Six steps here and the rest there: the same examples in the same steps."""
    for moved in (trained / f"to-{backend}", trained / f"from-{backend}"):
        assert reported(moved, "started", "resumed_from") == [6]
        whole = trained / "one-full"
        assert difference(reported(whole, "step", "train_loss")[6:], reported(moved, "step", "train_loss")) < 1e-5
        assert reported(whole, "step", "tokens")[6:] == reported(moved, "step", "tokens")
        assert_close_weights(whole, moved)


def test_padded_batches_are_shared_out_too(trained: Path) -> None:
    assert_same_run(trained / "one-full", trained / "padded")


def test_steps_say_what_each_worker_did(trained: Path) -> None:
    for workers, tokens in zip(
        reported(trained / "ddp-lora", "step", "workers"), reported(trained / "ddp-lora", "step", "tokens"), strict=True
    ):
        assert [worker["worker"] for worker in workers] == [0, 1]
        assert sum(worker["tokens"] for worker in workers) == tokens
        assert all(worker["busy_seconds"] > 0 and worker["memory_bytes"] > 0 for worker in workers)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    world_size=st.integers(1, 7),
    examples=st.integers(1, 20),
)
def test_ranks_share_every_step_and_none_is_idle_long(lengths: list[int], world_size: int, examples: int) -> None:
    plan = StepPlan(lengths, examples, 1, seed=3)
    for step in range(plan.steps_per_epoch):
        shares = [plan.samples(step, rank, world_size) for rank in range(world_size)]
        assert sorted(i for share in shares for i in share) == sorted(plan.samples(step))
        tokens = [sum(lengths[i] for i in share) for share in shares]
        assert max(tokens) - min(tokens) <= max(lengths[i] for i in plan.samples(step))
