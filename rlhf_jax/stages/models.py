"""Loading, training state and export of the models of a run."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.data.chat_template import stop_ids
from rlhf_jax.loss_scale import LossScaleConfig
from rlhf_jax.mesh import TRAIN, Layout, check_model_divides
from rlhf_jax.models.attention import describe_kernel, kernel_for_devices, kernel_for_mesh
from rlhf_jax.models.config import Choice, Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.dtypes import QUANTISED_KINDS
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.pretrained import (
    Pretrained,
    from_pretrained,
    reward_from_pretrained,
    save_adapter,
    save_pretrained,
)
from rlhf_jax.models.quantised import UNQUANTISED_DTYPE, Quantised, quantised_shardings
from rlhf_jax.models.unstacked import Unstacked
from rlhf_jax.policy import make_train_state
from rlhf_jax.rollout import eos_ids
from rlhf_jax.train_step import Params, TrainState

LOGGER = logging.getLogger(__name__)
Dtype = Literal["float32", "bfloat16", "float16"]
Switch = Literal[True, False, "auto"]  # "auto": the plan chooses
FrozenDtype = Literal["float32", "bfloat16", "float16", "int8", "nf4"]


@dataclass(frozen=True)
class NewModelConfig:
    """A small LLaMA-like model and tokenizer to train from scratch, used where model.actor is "new"."""

    vocab_size: int = 384  # tokens of the BPE tokenizer that is trained on the data
    hidden_size: int = 128  # width of the residual stream
    num_layers: int = 4  # transformer blocks
    num_heads: int = 4  # query heads, of hidden_size / num_heads rounded up to a multiple of 16
    num_kv_heads: int = 2  # key and value heads; fewer than num_heads: grouped-query attention
    mlp_size: int = 352  # width of the gated MLP
    max_positions: int = 256  # longest sequence, in tokens


@dataclass(frozen=True)
class ModelConfig:
    """Where the models come from, and how they are computed."""

    actor: str = "facebook/opt-1.3b"  # Hugging Face folder or hub id; "new": from scratch, with the sizes of model.new
    reward: str = "sft"  # what the reward model starts from: a folder or hub id, or "sft" for this run's SFT model
    lora: LoraConfig = LoraConfig()  # adapters of the actor
    reward_lora: LoraConfig = LoraConfig()  # adapters of the reward model, and of the critic that starts from it
    # dtype of activations, matrix products, generation weights and cache; "float16" scales the loss (model.loss_scale),
    # for GPUs without bfloat16 (V100, T4)
    dtype: Dtype = "bfloat16"
    loss_scale: LossScaleConfig = LossScaleConfig()  # dynamic loss scaling, where dtype is "float16"
    # dtype of weights that do not train; those that train are float32. "int8", "nf4": kernels under LoRA in 8.25 or
    # 4.13 bits per weight, and the other weights that do not train in bfloat16.
    frozen_dtype: FrozenDtype = "float32"
    export_dtype: Dtype = "float32"  # dtype of the exported folders
    # What the backward pass recomputes. "layers": all but each layer's input, least memory and a third more work;
    # "dots": all but those and the products' outputs (with one_copy a GPU then recomputes nothing); "none".
    remat: Literal["layers", "dots", "none", "auto"] = "layers"
    one_copy: Switch = False  # under LoRA: generate from the training base with unmerged adapters, not from a copy
    offload_optimizer: Switch = False  # keep optimizer moments in pinned host memory, on the devices one at a time
    offload_reference: Switch = False  # keep the reference in pinned host memory; it is on the devices while it scores
    offload_ema: Switch = False  # keep the moving average in pinned host memory
    logprob_chunk: int = 128  # positions whose logits exist at once; 0: all
    attention: Choice = "auto"  # "cudnn": fused, on NVIDIA GPUs; "xla"; "auto": fused where GPU, dtype and model allow
    new: NewModelConfig = NewModelConfig()  # the model that actor = "new" trains from scratch

    def __post_init__(self) -> None:
        if self.frozen_dtype in QUANTISED_KINDS and not self.lora.rank:
            raise ValueError(
                f'frozen_dtype="{self.frozen_dtype}" is for a base under LoRA, and here every weight of the actor '
                'trains: set lora = { rank = 16 }, or frozen_dtype = "bfloat16"'
            )
        if self.one_copy is True and not self.can_share:
            raise ValueError(
                "one_copy=true shares a base that does not train, in the dtype that generates: set "
                f'lora = {{ rank = 16 }} and frozen_dtype="{self.dtype}", "int8" or "nf4"'
            )

    @property
    def can_share(self) -> bool:
        """Whether training and generation can read the same base."""
        return self.lora.rank > 0 and self.frozen_dtype in (self.dtype, *QUANTISED_KINDS)

    @property
    def reward_from_policy(self) -> bool:
        """Whether the reward model starts from this run's policy."""
        return self.reward == "sft"

    @property
    def compute(self) -> Compute:
        return Compute(jnp.dtype(self.dtype), self.remat, self.logprob_chunk, self.attention, self.scaling)

    @property
    def scaling(self) -> LossScaleConfig | None:
        """How the loss is scaled; None: not at all."""
        return self.loss_scale if self.dtype == "float16" else None

    def stored_dtype(self, *, scalar_head: bool) -> Dtype:
        """The dtype to load a model in: trained weights are float32, so only a base under LoRA may be smaller."""
        lora = self.reward_lora if scalar_head else self.lora
        return self.frozen_dtype if lora.rank else "float32"

    def with_lora(self, config: DecoderConfig) -> DecoderConfig:
        """The architecture with the adapters that this configuration gives it."""
        return dataclasses.replace(config, lora=self.reward_lora if config.scalar_head else self.lora)


def load_model(
    path: str | Path,
    settings: ModelConfig,
    layout: Layout,
    *,
    scalar_head: bool = False,
    seed: int = 0,
    one_copy: bool = False,
) -> Pretrained:
    """A model with its tokenizer, its parameters sharded by `layout`.

    Args:
        seed: seed of a new scalar head.
        one_copy: shard by GENERATE the parameters that generation can share.
    Raises:
        ValueError: an error of `from_pretrained`, no tokenizer, or a tensor axis that does not divide the model.
    """
    assert isinstance(one_copy, bool), "the plan chooses before models are loaded"
    dtype, mesh = settings.stored_dtype(scalar_head=scalar_head), layout.mesh
    if scalar_head:
        model = reward_from_pretrained(path, mesh=mesh, dtype=dtype, seed=seed)
    else:
        model = from_pretrained(path, mesh=mesh, dtype=dtype, one_copy=one_copy)
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    check_model_divides({"attention heads": model.config.num_heads}, mesh)
    lora = settings.with_lora(model.config).lora
    if model.config.experts and lora.rank and {"gate", "up", "down"} & set(lora.targets):
        LOGGER.info("the experts have no adapters: only the attention of this sparse model is adapted")
    return relayout(model, layout)


def relayout(model: Pretrained, layout: Layout) -> Pretrained:
    """A model that is sharded by TRAIN, in another layout; each array is freed once its replacement exists."""
    if layout.table == TRAIN:
        return dataclasses.replace(model, layout=layout)
    params = {}
    for path, abstract in abstract_params(model.config).items():
        leaf, target = model.params.pop(path), layout.sharding(abstract.axes)
        if isinstance(leaf, Quantised):
            target = quantised_shardings(abstract.axes, leaf.kind, layout)
        # Unstacked weights are sharded by GENERATE already.
        params[path] = leaf if isinstance(leaf, Unstacked) else jax.block_until_ready(jax.device_put(leaf, target))
    return dataclasses.replace(model, params=params, layout=layout)


def log_devices(mesh: Mesh, settings: ModelConfig) -> None:
    """Log the devices, and the attention kernel where it does not depend on the models.

    Raises:
        ValueError: model.attention is "cudnn" and these devices do not support it.
    """
    kernel, device = kernel_for_devices(mesh, jnp.dtype(settings.dtype), settings.attention), mesh.devices.flat[0]
    attention = f"; attention: XLA ({kernel.reason})" if kernel.name == "xla" else ""
    LOGGER.info(f"devices: {mesh.size} x {device.device_kind}{attention}")
    capability = str(getattr(device, "compute_capability", ""))
    if settings.dtype == "bfloat16" and "0" < capability < "8":
        LOGGER.warning('these GPUs have no bfloat16 unit: model.dtype="float16" computes about eight times as fast')


def log_attention(
    stage: str,
    model: Pretrained,
    settings: ModelConfig,
    length: int,
    *,
    phases: str = "training",
    decodes: bool = False,
    packed: bool = False,
) -> None:
    """Log the attention kernel for rows of up to `length` tokens, and why, unless `log_devices` has logged it.

    Args:
        packed: whether a row may hold several documents.
    Raises:
        ValueError: model.attention is "cudnn" and this model, or packed rows, do not support it.
    """
    mesh, dtype = model.layout.mesh, jnp.dtype(settings.dtype)
    kernel = kernel_for_mesh(mesh, model.config, dtype, length, settings.attention, packed=packed)
    if kernel_for_devices(mesh, dtype, settings.attention).name == "cudnn":
        LOGGER.info(f"{stage}: attention: {describe_kernel(kernel, phases, decodes=decodes)}")


def make_state(
    model: Pretrained, settings: ModelConfig, tx: optax.GradientTransformation, seed: int
) -> tuple[TrainState, Params]:
    """The training state of a loaded model, and its frozen parameters. New adapters do not change the model."""
    return make_train_state(model, settings.with_lora(model.config), tx, settings.scaling, seed)


def copy_frozen(params: Params, dtype: FrozenDtype) -> Params:
    """Copies of the weights in `dtype` and with the same shardings.

    Quantised weights keep their dtype; for a quantised `dtype` all others are copied in bfloat16.
    """
    dtype = UNQUANTISED_DTYPE if dtype in QUANTISED_KINDS else dtype

    def copy(leaf):
        return jax.tree.map(jnp.copy, leaf) if isinstance(leaf, Quantised) else jnp.copy(leaf.astype(dtype))

    return {path: copy(leaf) for path, leaf in params.items()}


def export_model(model: Pretrained, params: Params, settings: ModelConfig, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder, adapters merged; and adapters alone to `folder`_adapter."""
    config, pad = settings.with_lora(model.config), {"pad_token_id": model.tokenizer.pad_token_id}
    ids = {key: model.hf_config[key] for key in ("bos_token_id",) if model.hf_config.get(key) is not None}
    ends = sorted({*eos_ids(model), *stop_ids(model.tokenizer)})
    trained = dataclasses.replace(
        model,
        config=config,
        params=params,
        generation_config=ids | model.generation_config | pad | {"eos_token_id": ends},
        # Callers that score with the model pad with its tokenizer, and transformers finds the padding by this id.
        hf_config={**model.hf_config, **(pad if model.config.scalar_head else {})},
    )
    if config.lora.rank:  # before the whole model, whose folder says that the stage is finished
        save_adapter(trained, folder.with_name(f"{folder.name}_adapter"), base=model.source, overwrite=True)
    save_pretrained(trained, folder, dtype=settings.export_dtype, overwrite=True)
