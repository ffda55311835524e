"""The one place that assembles a training run: it reads the whole config and hands each part its own section."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmforge.atomic import write_atomically
from llmforge.bucket import bucket_url
from llmforge.checkpoint import (
    Checkpoint,
    best_sound,
    last_sound,
    list_checkpoints,
    load_parameters,
    most_on_disk,
    state_bytes,
    sweep,
)
from llmforge.config.resolved import ResolvedConfig
from llmforge.errors import ModelError, ProofError, RunError
from llmforge.export.artifact import write_artifact
from llmforge.export.proof import FILE_NAME as PROOF
from llmforge.export.proof import Proof
from llmforge.export.prove_text import prove_text
from llmforge.export.prove_weights import LONGEST_PROBE, Recording, prove_weights, record, training_record
from llmforge.models.adapter import (
    add_lora,
    check_continuation,
    describe_left_out,
    describe_unmergeable,
    left_out,
    load_adapter,
    starting_point,
)
from llmforge.models.arithmetic import choose_matmul, give_back_memory, keep_freed_memory
from llmforge.models.causality import check_causal
from llmforge.models.device import DTYPES, autocast, device_name, free_memory
from llmforge.models.fused_lora import fuse_lora
from llmforge.models.fused_norm import fuse_norms
from llmforge.models.head import Head, find_head
from llmforge.models.isolation import Isolation, isolate
from llmforge.models.load import (
    build_skeleton,
    compile_layers,
    count_parameters,
    enable_activation_checkpointing,
    load_base_model,
)
from llmforge.models.quirks import mend
from llmforge.models.tokens import make_room, train_new_rows
from llmforge.tasks import Batch, LanguageModeling, PackedBatch
from llmforge.train.backends import Backend, make_backend
from llmforge.train.evaluation import Autocast, evaluate
from llmforge.train.feed import Ahead, Feed
from llmforge.train.loop import train
from llmforge.train.optimization import build_optimizer, build_schedule
from llmforge.train.prepare import Preparation
from llmforge.train.rehearsal import is_needed, rehearse
from llmforge.train.reporter import Reporter, Unheard
from llmforge.train.saver import Saver

Interruptions = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Makes a context in which an interrupt is remembered instead of raised, and the question whether one came."""


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    best_step: int
    metrics: dict[str, float]
    base_model: str
    parameters: int
    trainable_parameters: int
    proof: Proof


def check_model(preparation: Preparation) -> int:
    """Build the model without weights, check that the adapter fits it, and give the bytes that the run will write.

    Raises:
        ModelError: the adapter's targets do not exist or cannot be adapted, or the adapter to continue is another one.
    """
    config = preparation.config
    skeleton = build_skeleton(preparation.weights_source, trust_remote_code=config.model.trust_remote_code)
    new_rows = make_room(skeleton, preparation.new_tokens, rows=len(preparation.encoder.tokenizer))
    artifact = sum(p.numel() for p in skeleton.parameters()) * DTYPES[config.speed.dtype].itemsize
    if config.adapter is not None:
        # Some initialisations compute with the weights, which are not there yet; they change no name and no shape.
        options = train_new_rows(skeleton, config.adapter.options, new_rows)
        skeleton = add_lora(skeleton, {**options, "init_lora_weights": True})
        if preparation.adapter is not None:
            check_continuation(skeleton, preparation.adapter)
        artifact = state_bytes(skeleton, 0)
    kept = most_on_disk(config.checkpoint.num_checkpoints_to_keep)
    if bucket_url(config.output.output_dir):
        kept += 1  # while it is uploaded, it stays even where it is superseded
    return artifact + state_bytes(skeleton) * kept


def run(
    preparation: Preparation,
    *,
    checkpoints: Path,
    artifact: Path,
    reporter: Reporter,
    interruptions: Interruptions,
    add_documents: Callable[[Path, Result], None],
    resuming: bool = False,
    dry_run: bool = False,
    allow_unproven: bool = False,
) -> Result | None:
    """Load the model, train it, and write the artifact of its best state.

    Args:
        checkpoints, artifact: directories to write to.
        add_documents: writes card and loss curve into the artifact.
        resuming: continue from the last checkpoint in `checkpoints` that is whole.
        dry_run: stop before the first step, returning None.
        allow_unproven: publish the artifact even where its proof fails.

    Raises:
        InputError: the model cannot be loaded or adapted.
        ProofError: the artifact does not serve what was trained.
        RunError: training failed or was interrupted.
    """
    config = preparation.config
    keep_freed_memory()
    backend = _backend(preparation)
    last_checkpoint = _last_checkpoint(checkpoints, backend, reporter, resuming=resuming)
    _choose_matmul(backend, last_checkpoint)
    ready = _ready(preparation, backend.device if not backend.shards else torch.device("cpu"), reporter)
    model, start, head, forward_context = ready.model, ready.start, ready.head, ready.autocast
    parameters, trainable = count_parameters(model)
    tokenizer = preparation.encoder.tokenizer
    task = preparation.task(
        pad_token_id=tokenizer.pad_token_id or 0,
        pad_to=config.data.context_length if config.data.padding == "max_length" else None,
    )
    if last_checkpoint is not None:
        load_parameters(last_checkpoint, model)
    model = backend.prepare(model)
    optimizer = build_optimizer(
        config.optimization.optimizer, model.named_parameters(), weight_decay=config.optimization.weight_decay
    )
    model = backend.equip(model, optimizer)
    first_step = 0
    if last_checkpoint is not None:
        backend.load(last_checkpoint, model, optimizer)
        first_step = last_checkpoint.step
    if head is not None:
        head.stays_whole = backend.shards
    last_step, steps_per_epoch = preparation.total_steps, preparation.plan.steps_per_epoch
    if config.speed.torch_compile is not None:
        compile_layers(model, config.speed.torch_compile)
    data = preparation.train.dataset

    statistics = preparation.train.prepared.statistics
    reporter.event(
        "started",
        tag=config.output.tag,
        task=config.task.name,
        devices=_devices(backend, config),
        rows=statistics.rows,
        samples=len(data),
        tokens=int(data.lengths.sum()),
        trained_tokens=int(data.trained_tokens.sum()),
        steps=last_step,
        epochs=config.optimization.num_epochs,
        parameters=parameters,
        trainable_parameters=trainable,
        resumed_from=first_step or None,
    )
    if config.optimization.num_warmup_steps >= last_step:
        reporter.note(
            f"num_warmup_steps is {config.optimization.num_warmup_steps} and the run has {last_step} steps: the "
            "learning rate never reaches its peak. Set num_warmup_steps lower"
        )
    if dry_run:
        return None

    feed = Feed(
        task,
        data,
        preparation.plan,
        ready.isolation,
        batch_size=config.optimization.train_batch_size_per_device,
        context_length=config.data.context_length,
        device=backend.device,
        rank=backend.rank,
        world_size=backend.world_size,
    )
    loss = partial(task.loss, model, head=head)

    def measure(step: int) -> dict[str, float]:
        if preparation.valid is None:
            return {}
        valid = preparation.valid.dataset
        began = time.perf_counter()
        metrics = evaluate(
            model,
            loss,
            backend.rounds(feed.evaluation(valid, config.checkpoint.eval_batch_size_per_device), feed.filler),
            metrics=task.metrics,
            backend=backend,
            autocast=forward_context,
        )
        reporter.event("evaluation", step=step, **metrics, seconds=time.perf_counter() - began)
        return metrics

    saver = Saver(
        checkpoints,
        backend=backend,
        last_step=last_step,
        keep=config.checkpoint.num_checkpoints_to_keep,
        reporter=reporter,
    )

    def save(step: int, metrics: dict[str, float], *, only_to_resume: bool = False) -> None:
        saver.save(backend.state(model, optimizer), step=step, metrics=metrics, only_to_resume=only_to_resume)

    def evaluated() -> Batch | PackedBatch | None:
        if preparation.valid is None:
            return None
        batches = feed.evaluation(preparation.valid.dataset, config.checkpoint.eval_batch_size_per_device)
        return next(batches, None) or feed.filler()

    with (
        interruptions() as interrupted,
        _memory_in_words(preparation),
        Ahead(feed.step, last_step) as micro_batches,
        saver,
    ):
        largest = feed.largest()
        needed = is_needed(backend.device, largest.inputs()["input_ids"].numel(), preparation.fitting_tokens)
        if backend.total(float(needed)) and backend.undoes:
            tried = rehearse(
                model,
                loss,
                largest,
                evaluated,
                optimizer=optimizer,
                backend=backend,
                autocast=forward_context,
                checkpoints=checkpoints,
            )
            reporter.note(tried)
        if config.checkpoint.eval_first and first_step == 0:
            measure(0)
        train(
            model,
            loss,
            micro_batches=lambda index: backend.even(micro_batches(index), feed.filler),
            optimizer=optimizer,
            schedule=build_schedule(
                config.optimization.lr_scheduler_type,
                learning_rate=config.optimization.learning_rate,
                warmup_steps=config.optimization.num_warmup_steps,
                total_steps=last_step,
            ),
            backend=backend,
            autocast=forward_context,
            reporter=reporter,
            first_step=first_step,
            last_step=last_step,
            steps_per_epoch=steps_per_epoch,
            max_grad_norm=config.optimization.max_grad_norm,
            seed=config.optimization.seed,
            is_milestone=partial(_is_milestone, config, steps_per_epoch, last_step),
            milestone=lambda step: save(step, measure(step)),
            save=lambda step: save(step, {}, only_to_resume=True),
            settle=saver.settle,
            interrupted=interrupted,
        )

    if backend.rank:
        return None  # what is left to do is done once
    best = best_sound(checkpoints, in_memory=-1 if backend.shards else last_step, note=reporter.note)
    if backend.shards:
        del model, loss, head, ready, backend
        optimizer.param_groups.clear()
        optimizer.state.clear()
        give_back_memory()
        ready = _ready(preparation, _roomy(preparation), Unheard())  # everything has been said of this model
        model, start, head, forward_context = ready.model, ready.start, ready.head, ready.probing
        load_parameters(best, model)
        loss = partial(task.loss, model, head=head)
    else:
        give_back_memory()
        if best.step != last_step:
            load_parameters(best, model)
    device = next(model.parameters()).device
    native = preparation.facts.native_context_length or LONGEST_PROBE
    began = time.perf_counter()
    recording = record(
        model,
        encoder=preparation.encoder,
        task=task,
        compute_loss=loss,
        lay_out=feed.lay_out,
        rows=[row.samples[0].input_ids for row in preparation.rows_to_prove if row.samples],
        start=start,
        dtype=config.speed.dtype,
        longest=min(LONGEST_PROBE, native),
        device=device,
        autocast=forward_context,
    )
    proof_seconds = preparation.proof_seconds + time.perf_counter() - began
    base_model = _base_model_name(preparation)
    result: Result | None = None

    def finish(directory: Path) -> None:
        nonlocal model, optimizer, loss, head, ready, result
        del model, optimizer, loss, head, ready  # the proof loads the artifact, and two models may not fit
        began = time.perf_counter()
        proof = _prove(preparation, directory, recording, task, device)
        trained = training_record(directory, recording, task=task, dtype=config.speed.dtype, stop=preparation.stop)
        text = proof.to_json(trained)
        seconds = proof_seconds + time.perf_counter() - began
        reporter.event("proof", proven=proof.proven, **proof.sections, seconds=seconds)
        for remark in proof.remarks:
            reporter.note(remark)
        if not (proof.proven or allow_unproven):
            write_atomically(artifact.with_name(PROOF), text)
            raise ProofError(
                f"what would be served is not what was trained, so there is no artifact.\n{proof.message()}\n"
                f"{artifact.with_name(PROOF)} has all of it. The training is kept: --resume with --allow-unproven "
                "writes the artifact all the same, with the failure in its card"
            )
        write_atomically(directory / PROOF, text)
        result = Result(best.step, best.metrics, base_model, parameters, trainable, proof)
        add_documents(directory, result)

    write_artifact(
        artifact,
        model=model,
        start=start,
        base_model=base_model,
        # That of model_id, and not of other weights that the run began with.
        revision=config.model.revision if preparation.weights_source is preparation.tokenizer_source else None,
        dtype=DTYPES[config.speed.dtype],
        encoder=preparation.encoder,
        stop=preparation.stop,
        generate_kwargs=config.generation.generate_kwargs,
        finish=finish,
    )
    return result


def _prove(
    preparation: Preparation, directory: Path, recording: Recording, task: LanguageModeling, device: torch.device
) -> Proof:
    """Prove an artifact: its text side as it lies on disk, and its weights against what the trained model computed."""
    config = preparation.config
    text = prove_text(
        directory,
        encoder=preparation.encoder,
        stop=preparation.stop,
        task=task,
        rows=preparation.rows_to_prove,
        context_length=config.data.context_length,
        trust_remote_code=config.model.trust_remote_code,
    )
    weights = prove_weights(
        directory,
        recording,
        dtype=config.speed.dtype,
        weights_dtype=DTYPES[config.speed.dtype],
        device=device,
        autocast=autocast(device, config.speed.dtype),
        trust_remote_code=config.model.trust_remote_code,
        allow_pickle_weights=config.model.allow_pickle_weights,
    )
    findings = [*recording.findings, *text.findings, *weights.findings]
    return Proof({**text.sections, **weights.sections}, findings, [*weights.remarks])


def _last_checkpoint(checkpoints: Path, backend: Backend, reporter: Reporter, *, resuming: bool) -> Checkpoint | None:
    """Give the checkpoint to go on from, if there is one; the first rank looks at them, and tidies up."""
    step = -1
    if backend.rank == 0:
        sweep(checkpoints)
        found = last_sound(checkpoints, reporter.note) if resuming else None
        step = -1 if found is None else found.step
    step = int(backend.total(float(step) if backend.rank == 0 else 0.0))
    return next((checkpoint for checkpoint in list_checkpoints(checkpoints) if checkpoint.step == step), None)


def _choose_matmul(backend: Backend, checkpoint: Checkpoint | None) -> None:
    """Multiply fp32 matrices as the run did before, else as the first rank finds best: ranks and resumed runs agree."""
    if backend.device.type != "cpu":
        return
    chosen = None if checkpoint is None else checkpoint.matmul
    if chosen is None:
        found = choose_matmul(backend.device) if backend.rank == 0 else None
        wanted = backend.total(float(found is not None and found.precision == "medium"))
        chosen = "medium" if wanted else "highest"
    torch.set_float32_matmul_precision(chosen)


@dataclass(frozen=True)
class _Ready:
    """A model with all that is computed with it; `start` is an adapter's `starting_point`.

    It may be probed on another device than it is trained on; each has its context for forward passes.
    """

    model: Any
    start: dict[str, torch.Tensor]
    head: Head | None
    isolation: Isolation
    probing: Autocast
    autocast: Autocast


def _ready(preparation: Preparation, device: torch.device, reporter: Reporter) -> _Ready:
    """Load the model whole, on one device, and find out how it is to be run."""
    config = preparation.config
    torch.manual_seed(config.optimization.seed)  # a fresh adapter's weights
    model, start = _load_model(preparation, reporter)
    model.to(device)
    fuse_lora(model)
    if config.speed.torch_compile is None:  # which does the same for norms, and better
        fuse_norms(model)
    probing = autocast(device, config.speed.dtype)
    with probing():
        check_causal(model)
        head = find_head(model)
    isolation = _isolation(model, head, preparation, probing, reporter)
    return _Ready(model, start, head, isolation, probing, autocast(preparation.device, config.speed.dtype))


def _backend(preparation: Preparation) -> Backend:
    """Make the backend that the config names, of the ranks that are there."""
    devices, optimization = preparation.config.devices, preparation.config.optimization
    return make_backend(
        devices.parallel,
        preparation.device,
        bf16=preparation.config.speed.dtype == "bf16",
        offload=devices.fsdp_cpu_offload,
        deepspeed=None if devices.deepspeed_config_path is None else Path(devices.deepspeed_config_path),
        micro_batch=optimization.train_batch_size_per_device,
        max_grad_norm=optimization.max_grad_norm,
        hidden_size=preparation.facts.hidden_size,
    )


def _devices(backend: Backend, config: ResolvedConfig) -> str:
    """Name the devices of a run, and how they share the work."""
    name = f"{device_name(backend.device)}, {config.speed.dtype}"
    return name if backend.world_size == 1 else f"{backend.world_size} × {name}, {config.devices.parallel}"


def _roomy(preparation: Preparation) -> torch.device:
    """Give the device on which a whole model fits: training shared it out."""
    device, facts = preparation.device, preparation.facts
    parameters = 12 * facts.num_layers * facts.hidden_size**2 + 2 * facts.vocab_size * facts.hidden_size
    return device if free_memory(device) > 6 * parameters else torch.device("cpu")


@contextmanager
def _memory_in_words(preparation: Preparation) -> Iterator[None]:
    """Turn the device's out-of-memory error into what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        config = preparation.config
        raise RunError(
            f"out of memory on {device_name(preparation.device)} with train_batch_size_per_device "
            f"{config.optimization.train_batch_size_per_device} and context_length {config.data.context_length}. Lower "
            "one of them (raise gradient_accumulation_steps to keep the examples per step), or set "
            "gradient_checkpointing: true"
        ) from error


def _isolation(
    model: Any, head: Head | None, preparation: Preparation, autocast: Autocast, reporter: Reporter
) -> Isolation:
    """Find out whether examples may share sequences, unless the config says that they must not.

    Raises:
        ModelError: the config says that they must, and the model cannot keep them apart.
    """
    data = preparation.config.data
    if data.packing is False:
        return Isolation(False, False)
    found = isolate(model, head, autocast)
    if not found.packs and data.packing is True:
        raise ModelError(
            f"packing: given true, but in this {preparation.facts.architecture} model packed examples would not be "
            f"what they are alone: {found.reason}. Set packing: auto or false"
        )
    if not found.packs:
        reporter.note(f"packing is off: {found.reason}. Sequences of similar length are padded to one instead")
    elif not found.shares:
        reporter.note(f"what examples begin with in common is computed for each of them: {found.reason}")
    return found


def _load_model(preparation: Preparation, reporter: Reporter) -> tuple[Any, dict[str, torch.Tensor]]:
    """Load the base model and make trainable what the config says: the adapter, in fp32, or every weight, in fp32.

    Frozen weights are held in the computation's own number format; trained ones are not, because updates are smaller
    than what bf16 can resolve. The second value is the adapter's `starting_point`.
    """
    config = preparation.config
    attention = None
    if config.speed.flash_attention_2:
        if preparation.device.type == "cuda" and find_spec("flash_attn") is not None:
            attention = "flash_attention_2"
        else:
            reporter.note("flash_attention_2 needs a CUDA GPU and the flash-attn package; PyTorch's attention is used")
    if (config.speed.liger_kernel or {}).get("enabled"):
        reporter.note("liger_kernel: not used; llmforge's own loss in chunks and fused layers do that work")
    model = load_base_model(
        preparation.weights_source,
        dtype=DTYPES["fp32" if config.adapter is None else config.speed.dtype],
        attention=attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    mend(model)
    new_rows = make_room(model, preparation.new_tokens, rows=len(preparation.encoder.tokenizer))
    if config.speed.gradient_checkpointing:
        problem = enable_activation_checkpointing(model)
        if problem:
            reporter.note(problem)
    if config.adapter is None:
        return model, {}
    options = train_new_rows(model, config.adapter.options, new_rows)
    untouched = describe_left_out(left_out(model, options))
    if untouched:
        reporter.note(untouched)
    if preparation.adapter is not None:  # it belongs to the base weights as they are, however it once began
        model = add_lora(model, {**options, "init_lora_weights": True})
        load_adapter(model, preparation.adapter)
        return model, {}
    model = add_lora(model, options)
    if unmergeable := describe_unmergeable(model):
        reporter.note(unmergeable)
    return model, starting_point(model)


def _base_model_name(preparation: Preparation) -> str:
    """Name the base model so that PEFT finds it again: by its hub id, or by the directory of its plain weights."""
    source = preparation.weights_source
    return str(source.directory) if source.is_local else source.name


def _is_milestone(config: ResolvedConfig, steps_per_epoch: int, last_step: int, step: int) -> bool:
    every = config.checkpoint.frequency * (steps_per_epoch if config.checkpoint.unit == "epochs" else 1)
    return step == last_step or step % every == 0
