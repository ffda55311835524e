"""The `lora_config` section: every field of PEFT's `LoraConfig` that YAML can express.

PEFT itself is not imported: reading a config must not load torch. A test compares the names here with PEFT's own, so
that a field that PEFT adds is noticed. Fields that are not set stay with PEFT, except the few that `resolved.py` fills.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llmforge.config.section import Integers, LooseTuple, Names, Section

NamesOrPattern = Names | Annotated[str, Field(min_length=1)]
PositiveInteger = Annotated[int, Field(ge=1)]
LayerIndex = Annotated[int, Field(ge=0)]
LayerRange = Annotated[tuple[LayerIndex, LayerIndex], LooseTuple]
LoraInitialisation = (
    bool
    | Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica"]
    | Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]
)


class LoraConfig(Section):
    """The low-rank adapter that is trained instead of the whole model."""

    r: PositiveInteger = Field(8, description="Rank of the update matrices.")
    lora_alpha: PositiveInteger | None = Field(
        None, description="Scale: the update is multiplied by lora_alpha / r. Unset: 2 × r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: NamesOrPattern = Field(
        "all-linear",
        description="Names of the modules to adapt, a regular expression over their full names, or `all-linear`.",
    )
    exclude_modules: NamesOrPattern | None = Field(None, description="Names or pattern of modules to leave alone.")
    target_parameters: Names | None = Field(
        None, description="Names of bare parameters to adapt (experts of some mixture-of-experts models)."
    )
    modules_to_save: Names | None = Field(
        None, description="Modules trained and saved in full beside the adapter, for example `embed_tokens`, `lm_head`."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which bias terms are trained.")
    lora_bias: bool = Field(False, description="Gives the second update matrix a bias.")
    fan_in_fan_out: bool = Field(False, description="The adapted layers store their weight as (in, out).")
    init_lora_weights: LoraInitialisation = Field(True, description="How the update matrices start.")
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: scales by lora_alpha / sqrt(r).")
    use_dora: bool = Field(False, description="DoRA: learns the magnitude of each weight column separately.")
    use_qalora: bool = Field(False, description="QA-LoRA, for GPTQ-quantised layers.")
    qalora_group_size: PositiveInteger = Field(16, description="Group size of QA-LoRA's pooling.")
    layers_to_transform: LayerIndex | Annotated[tuple[LayerIndex, ...], LooseTuple] | None = Field(
        None, description="Indices of the layers to adapt; unset means all."
    )
    layers_pattern: NamesOrPattern | None = Field(None, description="Name of the model's layer list.")
    layer_replication: Annotated[tuple[LayerRange, ...], LooseTuple] | None = Field(
        None, description="Ranges [start, end) of layers to stack into a deeper model."
    )
    rank_pattern: dict[str, PositiveInteger] | None = Field(None, description="Ranks that differ, by module pattern.")
    alpha_pattern: dict[str, PositiveInteger] | None = Field(
        None, description="Values of lora_alpha that differ, by module pattern."
    )
    trainable_token_indices: Integers | dict[str, Integers] | None = Field(
        None, description="Token ids whose embeddings are trained, or such lists by embedding module."
    )
    ensure_weight_tying: bool = Field(False, description="Keeps tied layers tied when they are adapted.")
    alora_invocation_tokens: Integers | None = Field(
        None, description="Activated LoRA: token ids after which the adapter switches on."
    )
    loftq_config: dict[str, Any] | None = Field(None, description="LoftQ options.")
    eva_config: dict[str, Any] | None = Field(None, description="EVA options.")
    corda_config: dict[str, Any] | None = Field(None, description="CorDA options.")
    lora_ga_config: dict[str, Any] | None = Field(None, description="LoRA-GA options.")
    velora_config: dict[str, Any] | None = Field(None, description="VeLoRA options.")
    monteclora_config: dict[str, Any] | None = Field(None, description="MonteCLoRA options.")
    kasa_config: dict[str, Any] | None = Field(None, description="KaSA options.")
    use_bdlora: dict[str, Any] | None = Field(None, description="Block-diagonal LoRA options.")
    arrow_config: dict[str, Any] | None = Field(None, description="Arrow routing options.")
    runtime_config: dict[str, Any] | None = Field(None, description="PEFT's runtime options, which are not saved.")
    megatron_config: dict[str, Any] | None = Field(None, description="Megatron's transformer options.")
    megatron_core: str | None = Field(None, description="Module path of Megatron's core.")
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="PEFT's name for the kind of model.")
    peft_type: Literal["LORA"] | None = Field(None, description="PEFT's name for the kind of adapter.")
    inference_mode: Literal[False] | None = Field(None, description="Must be false: the adapter is trained.")
    base_model_name_or_path: str | None = Field(None, description="Recorded by PEFT in the adapter's config.")
    revision: str | None = Field(None, description="Revision of the base model, recorded by PEFT.")
    auto_mapping: dict[str, Any] | None = Field(None, description="Recorded by PEFT in the adapter's config.")
    peft_version: str | None = Field(None, description="Recorded by PEFT in the adapter's config.")
