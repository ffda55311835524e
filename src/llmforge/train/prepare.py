"""Everything a run needs before weights are loaded: files found, rows encoded, every value of the config settled.

What can be wrong is found here, in the order of what it costs to find out.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmforge.bucket import bucket_url
from llmforge.config import LoadedConfig, derive
from llmforge.config.capabilities import refuse_unavailable
from llmforge.config.load import Origin
from llmforge.config.resolved import ResolvedConfig, resolve
from llmforge.config.schema import FineTuningConfig, PromptFormatSection
from llmforge.config.section import RepoId
from llmforge.data import RowLayout, RowProblem
from llmforge.data.batches import StepPlan
from llmforge.data.blocks import read_rows
from llmforge.data.dataset import Dataset, PreparedData
from llmforge.data.executors import Executor, encode_here
from llmforge.data.files import find_files
from llmforge.data.prepare import prepare
from llmforge.errors import InputError, ModelError, NotAvailableError, PromptFormatError
from llmforge.export.artifact import build_generation_config, write_text_side
from llmforge.export.proof import Proof
from llmforge.export.prove_text import ROWS, Row, prove_text
from llmforge.models.bucket_models import download_from_bucket
from llmforge.models.device import best_dtype, find_device, free_memory
from llmforge.models.hub import download
from llmforge.models.load import ModelFacts, as_plain_directory, load_tokenizer, read_facts
from llmforge.models.source import ADAPTER_CONFIG, ModelSource, check_adapter, find_model
from llmforge.models.tokens import NewToken, add_tokens
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format
from llmforge.prompt.rows import RowEncoder
from llmforge.prompt.stock import stock_generation_config
from llmforge.tasks import TASKS, LanguageModeling
from llmforge.train.reporter import Reporter
from llmforge.train.unrolled import describe_unrolled

ROWS_LOOKED_AT = 100  # to see whether data holds conversations or plain documents


@dataclass(frozen=True)
class Split:
    """Rows of one kind (training or validation): as read, and as they fit into the context length."""

    prepared: PreparedData
    dataset: Dataset


@dataclass(frozen=True)
class Preparation:
    """What `run` works with. No weights are in it.

    `fitting_tokens` is how many tokens of a micro-batch should fit into memory.
    """

    config: ResolvedConfig
    device: torch.device
    tokenizer_source: ModelSource
    weights_source: ModelSource
    adapter: Path | None
    facts: ModelFacts
    encoder: Encoder
    new_tokens: Sequence[NewToken]
    stop: StopRules
    task: type[LanguageModeling]
    train: Split
    valid: Split | None
    plan: StepPlan
    fitting_tokens: float
    total_steps: int
    rows_to_prove: Sequence[Row]
    text_proof: Proof
    proof_seconds: float

    @property
    def embedding_rows(self) -> int | None:
        """The rows that the model's embeddings get for new tokens; None where they have enough."""
        rows = max([len(self.encoder.tokenizer), *(token.id + 1 for token in self.new_tokens)])
        return rows if self.new_tokens and rows > self.facts.vocab_size else None


def prepare_run(
    loaded: LoadedConfig,
    reporter: Reporter,
    progress: Callable[[int], None] | None = None,
    *,
    allow_unproven: bool = False,
    executor: Executor | None = None,
) -> Preparation:
    """Check and prepare everything that a run needs, short of loading weights.

    Args:
        progress: called with the number of rows prepared so far.
        allow_unproven: go on where the text side of the proof fails, saying so.
        executor: encodes the rows; None: processes of this machine do.

    Raises:
        InputError: any of its kinds; says what was given, what is allowed and what to change.
    """
    refuse_unavailable(loaded)
    loaded = _with_stock_format(loaded)
    config = loaded.config
    relative_to = loaded.path.parent
    deepspeed = _deepspeed_config(loaded)
    files = find_files(config.train_path, relative_to)
    valid_files = None if config.valid_path is None else find_files(config.valid_path, relative_to)

    cache_dir = _cache_dir(config)
    source = _find_model(loaded)
    weights_source = _initial_weights(config, source, relative_to)
    adapter = _initial_adapter(config, relative_to)
    facts = read_facts(source, trust_remote_code=config.trust_remote_code)
    _check_context_length(loaded, facts)
    task = TASKS[config.task or "causal_lm"]
    encoder, new_tokens = _build_encoder(config, source, facts)
    known = [text for text in config.added_tokens if text not in {token.text for token in new_tokens}]
    if known:
        reporter.note(
            f"added_tokens: the model has {', '.join(known)} already, and nothing is added for it. To train embeddings "
            "of tokens that the model has, set lora_config.trainable_token_indices"
        )
    if adapter is not None:
        _check_added_tokens(adapter, encoder.tokenizer, new_tokens, facts)
    stop = StopRules.derive(
        encoder, config.generation_config.stopping_sequences, config.generation_config.stopping_tokens
    )

    try:
        generation = build_generation_config(encoder, stop, config.generation_config.generate_kwargs)
    except InputError as error:
        raise loaded.error("generation_config.generate_kwargs", str(error)) from error

    layout = RowLayout(config.data_format, config.columns, task.needs_assistant)
    encode = RowEncoder(encoder, task.trained)
    fingerprint = encode.fingerprint()

    def read(paths: list[str]) -> PreparedData:
        return prepare(
            paths,
            layout=layout,
            encode=encode,
            fingerprint=fingerprint,
            cache_dir=cache_dir / "rows",
            workers=config.data_workers,
            on_bad_row=config.on_bad_row,
            progress=progress,
            executor=executor or encode_here,
        )

    train_rows = read(files)
    valid_rows = None if valid_files is None else read(valid_files)

    if not new_tokens:  # which give every token of the tokenizer a row
        _check_vocabulary(encoder, facts, [train_rows] if valid_rows is None else [train_rows, valid_rows])

    device = find_device()
    derived, memory = _derive(config, facts, device, train_rows)
    context_length = config.context_length or derived["context_length"].value
    train = Split(train_rows, train_rows.fit(context_length, config.overlong))
    valid = None if valid_rows is None else Split(valid_rows, valid_rows.fit(context_length, config.overlong))

    micro_batch = config.train_batch_size_per_device or derived["train_batch_size_per_device"].value
    accumulation = config.gradient_accumulation_steps or derived["gradient_accumulation_steps"].value
    # Which examples make a step is settled by the config, on however many workers a resumed run goes on.
    plan = StepPlan(train.dataset.lengths, micro_batch, accumulation * config.num_devices, config.seed)
    derived["num_epochs"] = derive.num_epochs(config.min_update_steps, plan.steps_per_epoch)
    total_steps = plan.steps_per_epoch * (config.num_epochs or derived["num_epochs"].value)
    located = _located(config, deepspeed, files, valid_files, source, weights_source, adapter, cache_dir)
    resolved = resolve(loaded, derived, located)

    if config.task is None and _has_assistant_turns(files, layout):
        reporter.note(
            "task: causal_lm (the default): every token is trained, prompts too. "
            "To train only what the assistant says, set task: instruction_tuning"
        )
    if unrolled := describe_unrolled(train_rows, encoder):
        reporter.note(unrolled)
    began = time.perf_counter()
    rows_to_prove = [
        row
        for split, paths in ((valid, valid_files), (train, files))
        if split is not None and paths is not None
        for row in _rows_to_prove(split, paths, layout)
    ]
    with tempfile.TemporaryDirectory() as directory:
        write_text_side(Path(directory), encoder, stop, generation)
        text_proof = prove_text(
            Path(directory),
            encoder=encoder,
            stop=stop,
            task=task(pad_token_id=encoder.tokenizer.pad_token_id or 0, pad_to=None),
            rows=rows_to_prove,
            context_length=context_length,
            trust_remote_code=config.trust_remote_code,
        )
    proof_seconds = time.perf_counter() - began
    _judge(text_proof, encoder, reporter, allow_unproven)
    return Preparation(
        config=resolved,
        device=device,
        tokenizer_source=source,
        weights_source=weights_source,
        adapter=adapter,
        facts=facts,
        encoder=encoder,
        new_tokens=new_tokens,
        stop=stop,
        task=task,
        train=train,
        valid=valid,
        plan=plan,
        fitting_tokens=derive.tokens_that_fit(memory),
        total_steps=total_steps,
        rows_to_prove=rows_to_prove,
        text_proof=text_proof,
        proof_seconds=proof_seconds,
    )


def load_encoder(loaded: LoadedConfig) -> Encoder:
    """Load the tokenizer and the prompt format of a config, nothing else.

    Raises:
        InputError: the model, its tokenizer or the format cannot be used.
    """
    loaded = _with_stock_format(loaded)
    source = _find_model(loaded)
    facts = read_facts(source, trust_remote_code=loaded.config.trust_remote_code)
    return _build_encoder(loaded.config, source, facts)[0]


def _rows_to_prove(split: Split, files: Sequence[str], layout: RowLayout) -> Iterator[Row]:
    """Give the first rows of a split, each with the samples that it is trained as."""
    for number, row in enumerate(itertools.islice(read_rows(files, layout), ROWS)):
        if isinstance(row.content, RowProblem):
            continue
        samples, dropped = split.dataset.samples_of_row(number)
        if samples or not dropped:
            yield Row(f"{row.file}:{row.line}", row.content, samples, dropped)


def _judge(proof: Proof, encoder: Encoder, reporter: Reporter, allow_unproven: bool) -> None:
    """Stop a run of which it is known beforehand that it would not serve what it trains."""
    for remark in proof.remarks:
        reporter.note(remark)
    if proof.proven:
        return
    text = f"what would be served is not what would be trained.\n{proof.message()}"
    format = encoder.format
    if isinstance(format, PromptFormat) and not format.assistant.startswith(format.trailing_assistant):
        text += (
            "\nprompt_format.assistant does not begin with trailing_assistant: the model would be trained behind "
            f"{format.assistant.partition('{instruction}')[0]!r} and asked behind {format.trailing_assistant!r}. Begin "
            "assistant with trailing_assistant"
        )
    if not allow_unproven:
        raise PromptFormatError(f"{text}\nNothing was trained. Change that, or go on all the same: --allow-unproven")
    reporter.note(f"unproven: {text}")


def _with_stock_format(loaded: LoadedConfig) -> LoadedConfig:
    """Fill in the format of a core model where the config gives none."""
    generation = loaded.config.generation_config
    stock = stock_generation_config(loaded.config.model_id)
    if stock is None or generation.prompt_format is not None:
        return loaded
    origin = Origin("derived", f"stock format of {loaded.config.model_id}")
    changes: dict[str, Any] = {"prompt_format": PromptFormatSection(**stock["prompt_format"])}
    if "stopping_sequences" not in generation.model_fields_set:
        changes["stopping_sequences"] = tuple(stock["stopping_sequences"])
    filled = {"generation_config": generation.model_copy(update=changes)}
    return replace(
        loaded,
        config=loaded.config.model_copy(update=filled),
        origins={**loaded.origins, **{f"generation_config.{key}": origin for key in changes}},
    )


def _find_model(loaded: LoadedConfig) -> ModelSource:
    config = loaded.config
    source = find_model(
        config.model_id,
        relative_to=loaded.path.parent,
        revision=config.revision,
        allow_pickle_weights=config.allow_pickle_weights,
        trust_remote_code=config.trust_remote_code,
        cache_dir=_cache_dir(config),
    )
    return as_plain_directory(source, _cache_dir(config))


def _cache_dir(config: FineTuningConfig) -> Path:
    return Path(config.cache_dir or derive.cache_dir().value).expanduser().resolve()


def _build_encoder(config: FineTuningConfig, source: ModelSource, facts: ModelFacts) -> tuple[Encoder, list[NewToken]]:
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    new_tokens = add_tokens(tokenizer, config.added_tokens, rows=facts.vocab_size)
    section = config.generation_config.prompt_format
    format = build_format(
        None if section is None else section.model_dump(exclude_unset=True),
        tokenizer,
        plain_text=config.data_format == "text",
    )
    return Encoder(tokenizer, format), new_tokens


def _check_added_tokens(adapter: Path, tokenizer: Any, new_tokens: Sequence[NewToken], facts: ModelFacts) -> None:
    """Check that an adapter to continue was trained with the same new tokens, if its tokenizer lies beside it."""
    if not (adapter / "tokenizer_config.json").is_file():
        return
    theirs = load_tokenizer(ModelSource(str(adapter), adapter)).get_vocab()
    indices = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("trainable_token_indices") or []
    trained = {row for rows in (indices.values() if isinstance(indices, dict) else [indices]) for row in rows}
    ours = {token.id: token.text for token in new_tokens}
    own = tokenizer.get_vocab()
    # Of the tokens that only its tokenizer has, those whose embeddings the adapter holds.
    added = {
        id: text
        for text, id in sorted(theirs.items(), key=lambda item: item[1])
        if text in ours.values() or (text not in own and (id in trained or id >= facts.vocab_size))
    }
    if added != ours:
        raise ModelError(
            f"initial_adapter_model_ckpt_path: the adapter in {adapter} was trained with the new tokens "
            f"{list(added.values())}, here they are {list(ours.values())}; give the same ones in the same order: "
            f"added_tokens: {json.dumps(list(added.values()), ensure_ascii=False)}"
        )


def _initial_weights(config: FineTuningConfig, source: ModelSource, relative_to: Path) -> ModelSource:
    """Find the base weights to start from: those of the model itself, or others of the same architecture."""
    given = config.initial_base_model_ckpt_path
    if given is None:
        return source
    found = find_model(
        given.repo_id if isinstance(given, RepoId) else given,
        key="initial_base_model_ckpt_path",
        relative_to=relative_to,
        allow_pickle_weights=config.allow_pickle_weights,
        trust_remote_code=config.trust_remote_code,
        cache_dir=_cache_dir(config),
    )
    weights = as_plain_directory(found, _cache_dir(config))
    ours, theirs = (read_facts(s, trust_remote_code=config.trust_remote_code) for s in (source, weights))
    if ours != theirs:
        raise ModelError(
            f"initial_base_model_ckpt_path: {weights.name} has another architecture than model_id ({theirs} instead "
            f"of {ours}); give weights of the same architecture"
        )
    return weights


def _initial_adapter(config: FineTuningConfig, relative_to: Path) -> Path | None:
    """Find the adapter to continue, and check that its files are whole."""
    given = config.initial_adapter_model_ckpt_path
    if given is None:
        return None
    key = "initial_adapter_model_ckpt_path"
    if isinstance(given, RepoId):
        directory = download(given.repo_id, key=key)
    elif url := bucket_url(given):
        directory = download_from_bucket(url, key=key, cache_dir=_cache_dir(config))
    else:
        candidates = [(base / Path(given).expanduser()).resolve() for base in (relative_to, Path.cwd())]
        directory = next((path for path in candidates if path.is_dir()), candidates[0])
    check_adapter(directory, key)
    return directory


def _check_context_length(loaded: LoadedConfig, facts: ModelFacts) -> None:
    given, native = loaded.config.context_length, facts.native_context_length
    if given is not None and native is not None and given > native:
        raise loaded.error(
            "context_length",
            f"given {given}; {loaded.config.model_id} was made for at most {native} tokens, and stretching its "
            f"positions (RoPE scaling) is not available in this version; set it to {native} or less",
            NotAvailableError,
        )


def _located(
    config: FineTuningConfig,
    deepspeed: Path | None,
    files: list[str],
    valid_files: list[str] | None,
    source: ModelSource,
    weights_source: ModelSource,
    adapter: Path | None,
    cache_dir: Path,
) -> dict[str, Any]:
    """Give the places that relative paths of the config stand for, so that the resolved config works from anywhere."""
    located: dict[str, Any] = {
        "train_path": [_absolute(file) for file in files],
        "valid_path": None if valid_files is None else [_absolute(file) for file in valid_files],
        "output_dir": bucket_url(config.output_dir) or str(Path(config.output_dir).expanduser().resolve()),
    }
    if config.cache_dir is not None:
        located["cache_dir"] = str(cache_dir)
    if deepspeed is not None:
        located["deepspeed"] = {"config_path": str(deepspeed)}
    if source.is_local and source.url is None:
        located["model_id"] = str(source.path)
    if config.initial_base_model_ckpt_path is not None and weights_source.is_local and weights_source.url is None:
        located["initial_base_model_ckpt_path"] = str(weights_source.path)
    initial_adapter = config.initial_adapter_model_ckpt_path
    if adapter is not None and not (isinstance(initial_adapter, RepoId) or bucket_url(initial_adapter or "")):
        located["initial_adapter_model_ckpt_path"] = str(adapter)
    return located


def _deepspeed_config(loaded: LoadedConfig) -> Path | None:
    """Find and check DeepSpeed's JSON, relative to the config file or to the working directory."""
    from llmforge.train.backends.zero import read_config

    if loaded.config.deepspeed is None:
        return None
    without = "remove deepspeed (--set deepspeed=null): llmforge then shares the work out itself"
    if find_spec("deepspeed") is None:
        raise loaded.error(
            "deepspeed", f"this package is not installed; `pip install 'llmforge[deepspeed]'`, or {without}"
        )
    given, places = Path(loaded.config.deepspeed.config_path).expanduser(), (loaded.path.parent, Path.cwd())
    path = next((path for place in places if (path := (place / given).resolve()).is_file()), None)
    if path is None:
        where = " or ".join(dict.fromkeys(str(place.resolve()) for place in places))
        raise loaded.error(
            "deepspeed.config_path", f"given {given}, and there is no such file in {where}; put it there, or {without}"
        )
    read_config(path)
    return path


def _absolute(file: str) -> str:
    return file if "://" in file else str(Path(file).resolve())


def _check_vocabulary(encoder: Encoder, facts: ModelFacts, splits: Sequence[PreparedData]) -> None:
    """Refuse token ids that the model has no embedding for. Tokenizers often know more tokens than the data use."""
    if len(encoder.tokenizer) <= facts.vocab_size:
        return
    largest = max(rows.largest_token_id() for rows in splits)
    if largest >= facts.vocab_size:
        raise ModelError(
            f"the data use token {largest} ({encoder.decode([largest])!r}), but the model has embeddings for "
            f"{facts.vocab_size} tokens only; use the tokenizer that belongs to the model, keep that text out of data "
            f"and prompt format, or have it learnt: added_tokens: [{json.dumps(encoder.decode([largest]))}]"
        )


def _derive(
    config: FineTuningConfig, facts: ModelFacts, device: torch.device, rows: PreparedData
) -> tuple[dict[str, derive.Derived], derive.MemoryFacts]:
    """Give a value and a reason to every key that depends on data, model or hardware; and what memory there is."""
    derived: dict[str, derive.Derived] = {}
    derived["context_length"] = derive.context_length(rows.statistics.max_tokens, facts.native_context_length)
    derived["dtype"] = derive.Derived(*best_dtype(device))
    derived["cache_dir"] = derive.cache_dir()
    derived["data_workers"] = derive.data_workers()
    derived["task"] = derive.Derived("causal_lm", "LLMForge's default")
    context_length = config.context_length or derived["context_length"].value
    # Workers on a CPU share its memory.
    sharing = config.num_devices if device.type == "cpu" else 1
    memory = derive.MemoryFacts(
        available_bytes=free_memory(device) // sharing,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        bytes_per_value=2 if (config.dtype or derived["dtype"].value) == "bf16" else 4,
        is_lora=config.lora_config is not None,
        gradient_checkpointing=config.gradient_checkpointing is True,
        on_cpu=device.type == "cpu",
    )
    if config.gradient_checkpointing == "auto":
        tokens = (config.train_batch_size_per_device or 1) * context_length
        derived["gradient_checkpointing"] = derive.gradient_checkpointing(memory, tokens)
        memory = replace(memory, gradient_checkpointing=derived["gradient_checkpointing"].value)
    derived["train_batch_size_per_device"] = derive.train_batch_size(memory, context_length)
    train_batch = config.train_batch_size_per_device or derived["train_batch_size_per_device"].value
    derived["eval_batch_size_per_device"] = derive.eval_batch_size(train_batch)
    derived["gradient_accumulation_steps"] = derive.gradient_accumulation_steps(
        train_batch,
        chosen_by_user=config.train_batch_size_per_device is not None,
        num_devices=config.num_devices,
    )
    if config.deepspeed is None:
        derived["parallel"] = derive.parallel(memory, context_length, config.num_devices)
    return derived, memory


def _has_assistant_turns(files: Sequence[str], layout: RowLayout) -> bool:
    """Say whether the first rows of the data hold assistant turns."""
    for row in itertools.islice(read_rows(files, layout), ROWS_LOOKED_AT):
        if not isinstance(row.content, RowProblem) and any(m["role"] == "assistant" for m in row.content["messages"]):
            return True
    return False
