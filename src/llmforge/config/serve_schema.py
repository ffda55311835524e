"""The files that deploy a model with Ray: RayLLM's model configs, Ray Serve LLM's, and the Serve applications of both.

The keys are theirs, so that one file drives their server and `llmforge serve --config`. Sections of which only Ray can
make anything are taken as they are. This module must not read files, and must not know what a value does.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from llmforge.config.schema import Count, PromptFormatSection
from llmforge.config.section import Integers, LooseTuple, Name, Section, StoragePath

Anything = dict[str, Any]
Number = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
Share = Annotated[int, Field(ge=0, le=1)] | Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[int, Field(ge=-2, le=2)] | Annotated[float, Field(ge=-2, le=2)]


class RayPromptFormatSection(PromptFormatSection):
    """How messages become text, with RayLLM's defaults and its way to write templates (`str.format`)."""

    trailing_assistant: str | None = Field("", description="What comes before the text that the model generates.")
    bos: str | None = Field(  # type: ignore[assignment]  # unset is not "": the tokenizer's own is written then
        None, description="Text in front of everything, once. Unset: what the tokenizer puts there."
    )
    strip_whitespace: bool = Field(True, description="Strips white space around each message's content.")
    system_in_last_user: Literal[False] = Field(False, description="Only the first user turn can hold the system text.")
    use_hf_chat_templates: bool = Field(
        False,
        validation_alias=AliasChoices("use_hf_chat_templates", "use_hugging_face_chat_template"),
        description="Takes the tokenizer's own Jinja chat template as it is.",
    )


class GenerateKwargs(Section):
    """Sampling options of requests that do not give them."""

    max_tokens: Count | None = Field(None, description="The most tokens of an answer.")
    max_new_tokens: Count | None = Field(None, description="The same, as transformers calls it.")
    do_sample: bool | None = Field(None, description="Whether tokens are drawn; false takes the likeliest.")
    temperature: Number | None = Field(None, description="0 takes the likeliest token.")
    top_p: Share | None = Field(None, description="Chooses among the likeliest that together have this probability.")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="Chooses among so many; 0 or -1: all.")
    min_p: Number | None = Field(None, description="Leaves out what has less than this share of the likeliest one's.")
    repetition_penalty: Number | None = Field(None, description="Divides the logits of tokens that are there.")
    presence_penalty: Penalty | None = Field(None, description="Taken from the logits of tokens that were generated.")
    frequency_penalty: Penalty | None = Field(None, description="The same, for each time that they were.")
    seed: int | None = Field(None, description="Makes answers repeatable.")
    return_token_type_ids: Literal[False] = Field(False, description="Of transformers; old files have it.")


class RayGenerationSection(Section):
    """LLMForge's `generation_config`, as its inference template has it."""

    prompt_format: RayPromptFormatSection | None = Field(
        None, description="How messages become text. Unset: the model's own format."
    )
    stopping_sequences: Annotated[tuple[Name | int | Integers, ...], LooseTuple] | None = Field(
        None, description="Texts that end an answer; a whole number is a token id."
    )
    stopping_tokens: Integers | None = Field(None, description="Token ids that end an answer, besides end-of-sequence.")
    generate_kwargs: GenerateKwargs = Field(GenerateKwargs(), description="Sampling options.")


class Mirror(Section):
    """A copy of a model in a bucket."""

    bucket_uri: StoragePath = Field(description="The model's directory: s3://… or gs://….")
    s3_sync_args: Annotated[tuple[str, ...], LooseTuple] = Field((), description="Options of Ray's download.")
    s3_aws_credentials: Anything | None = Field(None, description="How Ray gets credentials.")
    extra_files: Annotated[tuple[Anything, ...], LooseTuple] = Field((), description="Other files that Ray copies.")


class RayLoraSection(Section):
    """Adapters that are loaded when somebody asks for them."""

    dynamic_lora_loading_path: StoragePath | None = Field(None, description="Where their directories lie.")
    max_num_adapters_per_replica: Count = Field(16, description="How many are kept.")
    download_timeout_s: Number | None = Field(None, description="Of Ray's download.")
    max_download_tries: Count | None = Field(None, description="Of Ray's download.")


class DeploymentSection(Section):
    """Ray Serve's deployment."""

    name: str | None = Field(None, description="Of the deployment.")
    num_replicas: int | str | None = Field(None, description="Copies of the model.")
    autoscaling_config: Anything | None = Field(None, description="How their number changes.")
    max_ongoing_requests: Count | None = Field(None, description="Requests that a copy answers at a time.")
    max_concurrent_queries: Count | None = Field(None, description="The old name of max_ongoing_requests.")
    max_queued_requests: int | None = Field(None, description="Requests that may wait.")
    ray_actor_options: Anything | None = Field(None, description="Resources of a copy.")
    user_config: Anything | None = Field(None, description="What the deployment is told.")
    health_check_period_s: Number | None = Field(None, description="Of Ray Serve.")
    health_check_timeout_s: Number | None = Field(None, description="Of Ray Serve.")
    graceful_shutdown_wait_loop_s: Number | None = Field(None, description="Of Ray Serve.")
    graceful_shutdown_timeout_s: Number | None = Field(None, description="Of Ray Serve.")
    logging_config: Anything | None = Field(None, description="Of Ray Serve.")
    request_router_config: Anything | None = Field(None, description="Of Ray Serve.")
    placement_group_bundles: Annotated[tuple[Anything, ...], LooseTuple] | None = Field(None, description="Of Ray.")
    placement_group_strategy: str | None = Field(None, description="Of Ray.")


class MultiplexSection(Section):
    """RayLLM's bound on adapters."""

    max_num_models_per_replica: Count = Field(description="How many adapters are kept.")


class RayllmEngineSection(Section):
    """RayLLM's `engine_config`."""

    model_id: Name = Field(description="What clients call the model.")
    hf_model_id: StoragePath | None = Field(None, description="Directory or hub id of the model; unset: model_id.")
    tokenizer_id: StoragePath | None = Field(None, description="Directory or hub id of another tokenizer.")
    type: Literal["VLLMEngine"] = Field("VLLMEngine", description="RayLLM's engine.")
    model_type: Literal["text-generation", "text-generation-finetuned"] = Field(
        "text-generation", description="What RayLLM tells clients."
    )
    model_url: str | None = Field(None, description="What RayLLM tells clients.")
    model_description: str | None = Field(None, description="What RayLLM tells clients.")
    s3_mirror_config: Mirror | None = Field(None, description="Where the model is downloaded from instead.")
    gcs_mirror_config: Mirror | None = Field(None, description="Where the model is downloaded from instead.")
    engine_kwargs: Anything = Field({}, description="Arguments of vLLM.")
    max_total_tokens: Count | None = Field(None, description="The most tokens of prompt and answer together.")
    generation: RayGenerationSection = Field(
        RayGenerationSection(), description="Prompt format, stop rules and sampling options."
    )
    runtime_env: Anything | None = Field(None, description="Of Ray.")
    env_vars_to_propogate: Annotated[tuple[str, ...], LooseTuple] | None = Field(None, description="Of Ray.")


class RayllmModel(Section):
    """A model config of RayLLM."""

    engine_config: RayllmEngineSection = Field(description="The model and how it is prompted.")
    enabled: bool = Field(True, description="Whether it is served.")
    lora_config: RayLoraSection | None = Field(None, description="Adapters that are loaded on demand.")
    multiplex_config: MultiplexSection | None = Field(None, description="How many adapters are kept.")
    deployment_config: DeploymentSection | None = Field(None, description="Ray Serve's deployment.")
    scaling_config: Anything | None = Field(None, description="Ray's workers.")


class ModelLoadingSection(Section):
    """Ray Serve LLM's `model_loading_config`."""

    model_id: Name = Field(description="What clients call the model.")
    model_source: StoragePath | Mirror | None = Field(
        None, description="Directory, bucket or hub id of the model; unset: model_id."
    )
    tokenizer_source: StoragePath | None = Field(None, description="Directory or hub id of another tokenizer.")


class RayServeModel(Section):
    """A model config of Ray Serve LLM (`LLMConfig`), or of the RayLLM before it, which had `generation_config`."""

    model_loading_config: ModelLoadingSection = Field(description="The model and its name.")
    generation_config: RayGenerationSection = Field(
        RayGenerationSection(), description="Prompt format, stop rules and sampling options."
    )
    lora_config: RayLoraSection | None = Field(None, description="Adapters that are loaded on demand.")
    llm_engine: Literal["vLLM", "VLLM", "VLLMEngine"] = Field("vLLM", description="Ray's engine.")
    engine_kwargs: Anything = Field({}, description="Arguments of vLLM.")
    max_request_context_length: Count | None = Field(None, description="The most tokens of prompt and answer together.")
    deployment_config: DeploymentSection | None = Field(None, description="Ray Serve's deployment.")
    accelerator_type: str | None = Field(None, description="Of Ray.")
    accelerator_config: Anything | None = Field(None, description="Of Ray.")
    placement_group_config: Anything | None = Field(None, description="Of Ray.")
    resources_per_bundle: Anything | None = Field(None, description="Of Ray.")
    tensor_parallelism: Anything | None = Field(None, description="Of Ray.")
    input_modality: Literal["text"] = Field("text", description="What the model reads.")
    json_mode: Anything | None = Field(None, description="Answers can follow a schema without it.")
    runtime_env: Anything | None = Field(None, description="Of Ray.")
    server_cls: str | None = Field(None, description="Of Ray.")
    callback_config: Anything | None = Field(None, description="Of Ray.")
    experimental_configs: Anything | None = Field(None, description="Of Ray.")
    log_engine_metrics: bool | None = Field(None, description="Of Ray.")


class ApplicationArgs(Section):
    """The models of a Serve application: files, or model configs in place."""

    llm_configs: Annotated[tuple[Name | RayServeModel, ...], LooseTuple] = Field((), description="Of Ray Serve LLM.")
    models: Name | Annotated[tuple[Name | RayllmModel, ...], LooseTuple] = Field((), description="Of RayLLM.")
    ingress_deployment_config: Anything | None = Field(None, description="Of Ray Serve.")
    ingress_cls_config: Anything | None = Field(None, description="Of Ray Serve.")


class Application(Section):
    """An application of Ray Serve."""

    args: ApplicationArgs = Field(description="Its models.")
    name: str | None = Field(None, description="Of Ray Serve.")
    route_prefix: str | None = Field(None, description="Of Ray Serve.")
    import_path: str | None = Field(None, description="The program that Ray Serve runs.")
    runtime_env: Anything | None = Field(None, description="Of Ray.")
    deployments: Annotated[tuple[Anything, ...], LooseTuple] | None = Field(None, description="Of Ray Serve.")
    external_scaler_enabled: bool | None = Field(None, description="Of Ray Serve.")


class ServeFile(Section):
    """A config file of `serve run`."""

    applications: Annotated[tuple[Application, ...], LooseTuple] = Field(min_length=1, description="What is served.")
    proxy_location: str | None = Field(None, description="Of Ray Serve.")
    http_options: Anything | None = Field(None, description="Of Ray Serve.")
    grpc_options: Anything | None = Field(None, description="Of Ray Serve.")
    logging_config: Anything | None = Field(None, description="Of Ray Serve.")
