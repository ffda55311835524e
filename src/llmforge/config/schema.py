"""The public config: one flat model with LLMForge's key names, and the small sections nested in it.

Every key is typed, bounded and documented here and nowhere else; the JSON schema, the error messages and the docs are
made from it. A key that is None was not set; `resolved.py` gives it a value and a reason. This module must not read
files, and must not know what a value does.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmforge.config.lora_schema import LoraConfig
from llmforge.config.section import (
    CombinationError,
    Integers,
    LooseTuple,
    Name,
    Names,
    Problem,
    RepoId,
    Section,
    StoragePath,
)

TaskName = Literal["causal_lm", "instruction_tuning", "classification", "preference_tuning", "vision_language"]
DataFormat = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]
Count = Annotated[int, Field(ge=1)]
Resources = dict[str, Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]]
Initial = StoragePath | RepoId
DataPaths = StoragePath | Annotated[tuple[StoragePath, ...], LooseTuple, Field(min_length=1)]

# The names a row may have in each data format; `columns` says what the file calls them.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "output", "input", "system"),
    "sharegpt": ("conversations", "system", "tools"),
    "text": ("text",),
}

# A task that has a section of its own is meant when the section is there.
TASK_SECTIONS: dict[str, TaskName] = {
    "classifier_config": "classification",
    "preference_tuning_config": "preference_tuning",
    "vision_language_config": "vision_language",
}


_JINJA_KEYS = ("use_hf_chat_templates", "chat_template")


class PromptFormatSection(Section):
    """How messages become text: four templates, the tokenizer's own chat template, or a Jinja template."""

    system: str | None = Field(None, description="Template of the system message; contains {instruction}.")
    user: str | None = Field(
        None, description="Template of a user turn; contains {instruction}, and {system} with system_in_user."
    )
    assistant: str | None = Field(None, description="Template of an assistant turn; contains {instruction}.")
    trailing_assistant: str | None = Field(None, description="What comes before the text that the model generates.")
    bos: str = Field("", description="Text in front of everything, once.")
    system_in_user: bool = Field(False, description="The system text goes into the first user turn, at {system}.")
    default_system_message: str = Field("", description="System message of conversations that have none.")
    strip_whitespace: bool = Field(False, description="Strips white space around each message's content.")
    add_system_tags_even_if_message_is_empty: bool = Field(
        False, description="Writes the system template even when there is no system text."
    )
    use_hf_chat_templates: bool = Field(False, description="Takes the tokenizer's own Jinja chat template as it is.")
    chat_template: str | None = Field(None, min_length=1, description="A Jinja chat template to use as it is.")

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        jinja = ["use_hf_chat_templates"] if self.use_hf_chat_templates else []
        if self.chat_template is not None:
            jinja.append("chat_template")
        explicit = [key for key in type(self).model_fields if key in self.model_fields_set - set(_JINJA_KEYS)]
        problems = []
        if len(jinja) == 2:
            problems.append(
                Problem(("chat_template", "use_hf_chat_templates"), "given both; allowed one of them; remove one")
            )
        elif jinja and explicit:
            problems.append(
                Problem(
                    (jinja[0], *explicit),
                    f"given together with {', '.join(explicit)}; allowed alone, because a Jinja template is used as "
                    f"it is; remove {jinja[0]} or the other keys",
                )
            )
        elif not jinja:
            problems = self._explicit_problems()
        if problems:
            raise CombinationError(problems)
        return self

    def _explicit_problems(self) -> list[Problem]:
        problems = []
        for key, template in (("system", self.system), ("user", self.user), ("assistant", self.assistant)):
            if template is None:
                problems.append(_missing_template(key))
            elif "{instruction}" not in template:
                problems.append(
                    Problem(
                        (key,),
                        f'given "{template}"; allowed a text that contains {{instruction}}, the place of the message; '
                        "add {instruction}",
                    )
                )
        if self.trailing_assistant is None:
            problems.append(_missing_template("trailing_assistant"))
        if self.system_in_user and self.user is not None and "{system}" not in self.user:
            problems.append(
                Problem(
                    ("user", "system_in_user"),
                    f'given "{self.user}" with system_in_user: true; allowed a text that contains {{system}}; '
                    "add {system}, or set system_in_user: false",
                )
            )
        return problems


def _missing_template(key: str) -> Problem:
    return Problem(
        (key,),
        "missing; a prompt format has system, user, assistant and trailing_assistant, or "
        f"use_hf_chat_templates: true, or chat_template; add {key}",
    )


class GenerationConfig(Section):
    """How the model is prompted and where its generation ends, in training and in serving."""

    prompt_format: PromptFormatSection | None = Field(
        None, description="How messages become text. Unset: the tokenizer's own chat template."
    )
    stopping_sequences: Names = Field((), description="Texts that end a generation.")
    stopping_tokens: Integers = Field((), description="Token ids that end a generation, besides end-of-sequence.")
    generate_kwargs: dict[str, Any] = Field({}, description="Sampling options: temperature, top_p, max_new_tokens, …")


class ClassifierConfig(Section):
    """Options of the task `classification`."""

    label_tokens: Names = Field(min_length=2, description="The labels; each becomes one special token.")
    eval_metrics: Annotated[
        tuple[Literal["accuracy", "f1", "precision", "recall", "prauc", "rocauc"], ...], LooseTuple
    ] = Field(("accuracy",), description="What evaluation measures.")

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        repeated = sorted({label for label in self.label_tokens if self.label_tokens.count(label) > 1})
        if repeated:
            raise CombinationError(
                [Problem(("label_tokens",), f"given {', '.join(repeated)} more than once; remove the copies")]
            )
        return self


class LogprobProcessorScalingConfig(Section):
    """The worker pool that computes the reference model's log-probabilities."""

    custom_resources: Resources = Field({}, description="Ray resources of each worker.")
    concurrency: Count | Annotated[tuple[Count, Count], LooseTuple] = Field(
        1, description="Number of workers, or [minimum, maximum]."
    )
    batch_size: Count = Field(1, description="Pairs that a worker takes at a time.")


class PreferenceTuningConfig(Section):
    """Options of the task `preference_tuning`."""

    beta: float = Field(0.1, gt=0, le=1, description="How strongly the model is held to the reference model.")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="The preference loss.")
    logprob_processor_scaling_config: LogprobProcessorScalingConfig | None = Field(
        None, description="The worker pool for reference log-probabilities."
    )


class VisionLanguageConfig(Section):
    """Options of the task `vision_language`."""

    max_image_pixels: Count | None = Field(None, description="Larger images are scaled down to this many pixels.")
    freeze_vision_encoder: bool = Field(True, description="Trains the language model and projector only.")
    processor_kwargs: dict[str, Any] = Field({}, description="Options of the model's own image processor.")


class DeepSpeedConfig(Section):
    """Training with DeepSpeed."""

    config_path: StoragePath = Field(
        description="DeepSpeed's JSON file, relative to this config or to the working directory."
    )


class LigerKernelKwargs(Section):
    """Which fused kernels Liger replaces."""

    rms_norm: bool = Field(True, description="Fused RMSNorm.")
    rope: bool = Field(True, description="Fused rotary embedding.")
    swiglu: bool = Field(True, description="Fused SwiGLU.")
    cross_entropy: bool = Field(True, description="Fused cross-entropy.")
    fused_linear_cross_entropy: bool = Field(True, description="Cross-entropy fused with the output layer.")


class LigerKernel(Section):
    """Liger's fused Triton kernels."""

    enabled: bool = Field(False, description="Uses the kernels.")
    kwargs: LigerKernelKwargs = Field(LigerKernelKwargs(), description="Which of them.")


class TorchCompileConfig(Section):
    """Compiles the model; options of `torch.compile`."""

    backend: Name = Field("inductor", description="Compiler back end.")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="What the compiler optimises for."
    )
    fullgraph: bool = Field(False, description="Fails instead of splitting the graph.")
    dynamic: bool | None = Field(None, description="Compiles for changing lengths. Unset: torch decides.")


class CheckpointAndEvaluationFrequency(Section):
    """When the model is evaluated and a checkpoint written; the two go together."""

    unit: Literal["epochs", "steps"] = Field("epochs", description="What is counted.")
    frequency: Count = Field(1, description="Every so many of them.")


class Logger(Section):
    """Where metrics are sent, besides the run directory."""

    provider: Literal["wandb", "mlflow", "tensorboard", "trackio"] = Field(description="The service.")
    provider_config: dict[str, Any] = Field({}, description="The service's own options: project, name, tracking_uri, …")
    rank_zero_only: bool = Field(True, description="Only the first worker logs.")


class FineTuningConfig(Section):
    """A fine-tuning run, as its YAML file describes it."""

    model_id: StoragePath = Field(
        description="Hub id, local directory, s3:// or gs:// directory, or .gguf file: architecture, tokenizer, weights"
    )
    revision: Name | None = Field(None, description="Branch, tag or commit of the hub repository.")
    trust_remote_code: bool = Field(False, description="Runs Python code that the model's repository carries.")
    allow_pickle_weights: Names = Field(
        (), description="File names of pickled weights that may be loaded; all others are refused."
    )
    initial_base_model_ckpt_path: Initial | None = Field(
        None, description="Start from these base weights instead; same architecture as model_id."
    )
    initial_adapter_model_ckpt_path: Initial | None = Field(None, description="Continue training this LoRA adapter.")

    added_tokens: Names = Field(
        (), description="Texts that become one token each; their embeddings start from those of their parts."
    )

    train_path: DataPaths = Field(
        description="Training rows: path, glob, URL (s3://, gs://, https://, hf://datasets/…), or a list of them."
    )
    valid_path: DataPaths | None = Field(None, description="Validation rows, written like train_path.")
    data_format: DataFormat = Field("messages", description="The shape of a row.")
    columns: dict[str, Name] = Field({}, description="What the file calls the columns, for example {prompt: question}.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="What a row that cannot be used does: stop before the start, or be recorded and skipped."
    )
    cache_dir: StoragePath | None = Field(None, description="Where prepared data is kept. Unset: the platform's cache.")
    data_workers: Count | None = Field(
        None,
        description="Processes that tokenise. Unset: one for each CPU (of the Ray cluster, if any).",
    )

    task: TaskName | None = Field(
        None, description="Which tokens carry loss. Unset: the task whose section is given, else causal_lm."
    )
    classifier_config: ClassifierConfig | None = Field(None, description="Options of the task classification.")
    preference_tuning_config: PreferenceTuningConfig | None = Field(
        None, description="Options of the task preference_tuning."
    )
    vision_language_config: VisionLanguageConfig | None = Field(
        None, description="Options of the task vision_language."
    )
    generation_config: GenerationConfig = Field(
        GenerationConfig(), description="Prompt format, and where generation ends."
    )

    context_length: Count | None = Field(
        None,
        description="Longest sequence in tokens. Unset: the smallest multiple of 64 that holds the longest example, "
        "at most the model's native length.",
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What happens to rows longer than context_length; always counted and listed."
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="Several examples in one sequence, each attending only to itself."
    )
    padding: Literal["longest", "max_length"] | None = Field(
        None, description="Pads each batch to its longest sequence, or to context_length."
    )

    num_epochs: Count | None = Field(
        None, description="Passes over the training data. Unset: enough for min_update_steps."
    )
    min_update_steps: Count = Field(100, description="Without num_epochs: at least this many optimizer steps.")
    train_batch_size_per_device: Count | None = Field(
        None, description="Sequences per device in a forward pass. Unset: what fits into memory."
    )
    eval_batch_size_per_device: Count | None = Field(None, description="The same in evaluation.")
    gradient_accumulation_steps: Count | None = Field(
        None, description="Forward passes per optimizer step. Unset: about 16 examples per step."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate. Unset: 1e-4 with lora_config, 1e-5 without."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate after warm-up."
    )
    num_warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises.")
    optimizer: Literal["adamw", "sgd", "adafactor"] = Field("adamw", description="The optimizer.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds data order, initialisation and dropout.")
    dtype: Literal["bf16", "fp32"] | None = Field(
        None, description="Number format of weights and computation. Unset: bf16 where the hardware has it, else fp32."
    )

    num_devices: Count = Field(1, description="Workers: one GPU each, or CPU processes where there is no GPU.")
    worker_resources: Resources = Field({}, description="Ray resources of each worker.")
    trainer_resources: Resources = Field({}, description="Extra Ray resources of the first worker.")
    deepspeed: DeepSpeedConfig | None = Field(None, description="Trains with DeepSpeed.")
    parallel: Literal["auto", "ddp", "fsdp2", "deepspeed"] = Field("auto", description="How devices share the work.")
    fsdp_cpu_offload: bool = Field(
        False, description="With fsdp2: parameters, gradients and optimizer state lie in the host's memory."
    )
    max_failures: int = Field(
        3, ge=0, description="How often a run on Ray is started again from its last checkpoint when a worker is lost."
    )
    worker_timeout: Count = Field(
        1800, description="Seconds that workers on Ray wait for one that hangs; then it counts as lost."
    )

    flash_attention_2: Literal["auto"] | bool = Field(
        "auto", description="FlashAttention 2, where the hardware and its package are there."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Recomputes activations in the backward pass: less memory, more time."
    )
    liger_kernel: LigerKernel | None = Field(None, description="Fused kernels.")
    torch_compile_config: TorchCompileConfig | None = Field(None, description="Compiles the model.")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="Holds the base weights in fewer bits under a LoRA adapter (QLoRA)."
    )
    lora_config: LoraConfig | None = Field(
        None, description="Trains a LoRA adapter; any field of PEFT's LoraConfig. Unset: all parameters are trained."
    )

    checkpoint_and_evaluation_frequency: CheckpointAndEvaluationFrequency = Field(
        CheckpointAndEvaluationFrequency(), description="When to evaluate and write a checkpoint."
    )
    num_checkpoints_to_keep: Count = Field(
        1, description="Checkpoints kept: the best by validation loss; the last two are always kept too."
    )
    eval_first: bool = Field(False, description="Evaluates once before the first step.")
    custom_model_tag: Name | None = Field(
        None, description="Name of the run. Unset: {model_id}:{user[:5]}:{5 letters}."
    )
    output_dir: StoragePath = Field("runs", description="Where run directories are made; local, s3:// or gs://.")
    logger: Logger | None = Field(None, description="Sends metrics to a tracking service.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = contradictions(self)
        if problems:
            raise CombinationError(problems)
        return self


def contradictions(config: FineTuningConfig) -> list[Problem]:
    """Return every pair of values that cannot go together, each with what to change."""
    problems: list[Problem] = []

    def refuse(keys: tuple[str, ...], text: str) -> None:
        problems.append(Problem(keys, text))

    sections = [
        key
        for key, section in (
            ("classifier_config", config.classifier_config),
            ("preference_tuning_config", config.preference_tuning_config),
            ("vision_language_config", config.vision_language_config),
        )
        if section is not None
    ]
    if len(sections) > 1:
        refuse(
            tuple(sections),
            f"given together with {', '.join(sections[1:])}; allowed one task's section; remove the others",
        )
    elif sections and config.task is not None and config.task != TASK_SECTIONS[sections[0]]:
        refuse(
            (sections[0], "task"),
            f"given with task: {config.task}; allowed with task: {TASK_SECTIONS[sections[0]]}; "
            f"change the task, or remove {sections[0]}",
        )
    if config.task == "classification" and config.classifier_config is None:
        refuse(
            ("task", "classifier_config"),
            "given classification without classifier_config; add classifier_config: {label_tokens: [a, b]}",
        )

    repeated = sorted({text for text in config.added_tokens if config.added_tokens.count(text) > 1})
    if repeated:
        refuse(("added_tokens",), f"given {', '.join(repeated)} more than once; remove the copies")

    unknown = sorted(set(config.columns) - set(COLUMNS[config.data_format]))
    if unknown:
        refuse(
            ("columns", "data_format"),
            f"given {', '.join(unknown)}; allowed with data_format: {config.data_format}: "
            f"{', '.join(COLUMNS[config.data_format])}, each followed by the file's own name; rename the left side",
        )

    if config.packing is True and config.padding is not None:
        refuse(
            ("packing", "padding"),
            f"given true together with padding: {config.padding}; packed sequences are not padded; remove one of them",
        )
    if config.padding == "max_length" and config.context_length is None:
        refuse(
            ("padding", "context_length"),
            "given max_length without context_length; max_length pads to context_length; add context_length",
        )

    if config.lora_config is None:
        if config.quantization != "none":
            refuse(
                ("quantization", "lora_config"),
                f"given {config.quantization} without lora_config; quantised weights cannot be trained themselves; "
                "add lora_config, or remove quantization",
            )
        if config.initial_adapter_model_ckpt_path is not None:
            refuse(
                ("initial_adapter_model_ckpt_path", "lora_config"),
                "given without lora_config; the adapter continues to be trained as LoRA; add lora_config, or remove it",
            )

    if config.parallel == "deepspeed" and config.deepspeed is None:
        refuse(
            ("parallel", "deepspeed"),
            "given deepspeed without deepspeed.config_path; add deepspeed: {config_path: FILE.json}",
        )
    if config.parallel in ("ddp", "fsdp2") and config.deepspeed is not None:
        refuse(
            ("parallel", "deepspeed"),
            f"given {config.parallel} together with deepspeed; allowed auto or deepspeed; change parallel, or remove "
            "deepspeed",
        )

    if config.fsdp_cpu_offload and config.parallel != "fsdp2":
        refuse(
            ("fsdp_cpu_offload", "parallel"),
            f"given true with parallel: {config.parallel}; only fsdp2 has it; set parallel: fsdp2, or remove it",
        )
    if config.optimizer == "adafactor" and config.parallel in ("fsdp2", "deepspeed"):
        refuse(
            ("optimizer", "parallel"),
            f"given adafactor with parallel: {config.parallel}; its state has other shapes than the parameters, which "
            "are shared out; set optimizer: adamw, or parallel: ddp",
        )

    if config.eval_first and config.valid_path is None:
        refuse(
            ("eval_first", "valid_path"), "given true without valid_path; there is nothing to evaluate; add valid_path"
        )
    lora = config.lora_config
    if lora is not None and isinstance(lora.target_modules, str) and lora.layers_to_transform is not None:
        refuse(
            ("lora_config.layers_to_transform", "lora_config.target_modules"),
            f"given with target_modules: {lora.target_modules}; PEFT allows it only with a list of module names; "
            "write target_modules as a list",
        )
    return problems
