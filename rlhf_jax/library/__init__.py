"""The library: the steps of a training loop as functions of an explicit state, on the parts that the stages use.

An `Engine` samples, scores and trains one language model on one mesh. It keeps no state between calls: a method takes
a `PolicyState` and returns the next one, whose memory it may take from the first.

B rows of T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import hosts
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.decode import Decoding
from rlhf_jax.library.programs import LibraryPrograms, Loss, Over, make_library_programs
from rlhf_jax.library.rows import check_batch, pad_prompts
from rlhf_jax.library.states import PolicyAnswer, PolicyState, bit_sum
from rlhf_jax.loss_scale import LossScaleConfig
from rlhf_jax.mesh import check_divides
from rlhf_jax.models.config import Compute, DecoderConfig, Remat
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.dtypes import DTYPES
from rlhf_jax.models.inference import Inference, Weights
from rlhf_jax.models.lora import NO_LORA, LoraConfig, is_trainable
from rlhf_jax.models.pretrained import Pretrained, save_adapter, save_pretrained
from rlhf_jax.policy import make_train_state
from rlhf_jax.rollout import Publish, eos_ids, make_generate, make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.train_step import Params, TrainState, state_shardings


def make_engine(
    model: Pretrained,
    tx: optax.GradientTransformation,
    *,
    lora: LoraConfig = NO_LORA,
    dtype: str = "float32",
    remat: Remat = "layers",
    logprob_chunk: int = 128,
    micro_batch_size: int = 0,
) -> Engine:
    """An engine for models like this one, on its mesh. Nothing is compiled before the first call.

    Args:
        model: a language model from `from_pretrained`; its adapters, where it has some, train on.
        tx: the optimizer, with its schedule and clipping: `make_optimizer`, or any of optax.
        lora: new adapters, of which alone are trained; without any, all parameters are, in float32.
        dtype: of activations, matrix products, generation weights and KV cache, "float32", "bfloat16" or "float16";
            in float16 the loss is scaled, so that small gradients do not vanish.
        remat: what the backward pass recomputes: "layers" takes least memory, "none" least time, "dots" is between.
        logprob_chunk: positions whose logits exist at once; 0: all.
        micro_batch_size: rows of one forward and backward pass, over all devices; 0: all rows of a call.
    Raises:
        ValueError: a scalar head, an unknown dtype, new adapters for a model that has some, targets that the model
            lacks, or a negative size.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and gives tokens no probabilities: load it with from_pretrained")
    if lora.rank and model.config.lora.rank:
        raise ValueError("this model has adapters, which train on: leave lora out, or load the model without adapter=")
    for name, value, choices in (("dtype", dtype, DTYPES), ("remat", remat, get_args(Remat))):
        if value not in choices:
            raise ValueError(f'{name}="{value}": choose among {", ".join(choices)}')
    if min(logprob_chunk, micro_batch_size) < 0:
        raise ValueError("logprob_chunk and micro_batch_size: at least 0, and 0 takes all at once")
    config = dataclasses.replace(model.config, lora=lora) if lora.rank else model.config
    if not config.lora.rank and not all(isinstance(leaf, jax.Array) for leaf in model.params.values()):
        raise ValueError("quantised and shared parameters do not train: give lora, or load the model in float32")
    scaling = LossScaleConfig() if dtype == "float16" else None
    compute = Compute(jnp.dtype(dtype), remat, logprob_chunk, scaling=scaling)
    programs = make_library_programs(config, tx, compute, model.layout)
    return Engine(dataclasses.replace(model, params={}), config, tx, compute, micro_batch_size, programs)


@dataclass(frozen=True, eq=False)
class Engine:
    """The steps of a training loop, as methods that take and return a `PolicyState`. See `make_engine`.

    Attributes:
        model: without its parameters: architecture, mesh, tokenizer, source.
        config: the architecture with the adapters that train.
        programs: the compiled programs.
    """

    model: Pretrained
    config: DecoderConfig
    tx: optax.GradientTransformation
    compute: Compute
    micro_batch_size: int
    programs: LibraryPrograms

    def init(self, model: Pretrained, seed: int = 0) -> PolicyState:
        """The state before the first step. What trains is copied, so that the model can still be used.

        Args:
            model: the one that the engine was made for, or another with its architecture and mesh.
            seed: of new adapters, which do not change the model.
        Raises:
            ValueError: a model of another architecture or on another mesh, or no linear for the adapters.
        """
        self._check_model(model)
        copies = {path: jnp.copy(x) for path, x in model.params.items() if is_trainable(path, self.config.lora)}
        return PolicyState(*self._start(dataclasses.replace(model, params=model.params | copies), seed))

    def publish(self, state: PolicyState) -> Weights:
        """The weights in the layout that generates, adapters merged, for several calls of `sample`. They take the
        memory of another copy of the model in `dtype` until they are deleted."""
        self._check_state(state)
        return self._publisher(state.params)

    def sample(
        self,
        policy: PolicyState | Weights,
        prompts: Sequence[Sequence[int]],
        config: SampleConfig,
        key: jax.Array,
        *,
        stop_ids: Sequence[int] = (),
        rows: int = 0,
    ) -> list[PolicyAnswer]:
        """Answers to prompts of any lengths: tokens in, tokens out. The longest prompt is padded to a power of two, and
        each number of prompts and padded length is compiled once.

        Args:
            policy: a state, whose weights are published for this call alone, or what `publish` returned.
            prompts: token ids of each, at least one.
            config: temperature, filters, lengths; `num_samples` answers to each prompt, one after the other.
            key: from jax.random.key; the same key gives the same answers on any number of devices.
            stop_ids: tokens that end an answer; (): those that the model's folder names.
            rows: answers decoded at a time, a row that ends takes the next prompt; 0: all at once.
        Returns:
            len(prompts) x num_samples answers. Without filters their logprobs are those of `score` at the temperature.
        Raises:
            ValueError: an empty prompt, an id outside the vocabulary or not an integer, more positions than the model
                has, settings that define no distribution, or no token that ends an answer.
        """
        weights = policy if isinstance(policy, dict) else self.publish(policy)
        tokens, mask = pad_prompts(prompts, self.config)
        model = Inference(self.config, self._publisher.layout, self.compute.dtype, self.compute.attention)
        decoding = Decoding(model, config, tuple(sorted(stop_ids)) or eos_ids(self.model))
        rollout = hosts.fetch(make_generate(decoding, rows)(weights, tokens, mask, key))
        sizes = rollout.mask.sum(axis=1)
        return [
            PolicyAnswer(ids[:size].tolist(), logprobs[:size].tolist(), bool(ended))
            for ids, logprobs, size, ended in zip(rollout.tokens, rollout.logprobs, sizes, rollout.ended, strict=True)
        ]

    def score(
        self, policy: PolicyState | Pretrained, batch: Mapping[str, Any], *, temperature: float = 1.0
    ) -> np.ndarray:
        """The log-probability of every token, given those before it: [B, T] float32, on the host.

        0 at the first token of a row and on padding.

        Args:
            policy: a state; or a language model on the same mesh, such as the one that training started from
                (a reference) or a larger one with the same vocabulary (a teacher).
            batch: "tokens" and "mask", as in `forward_backward`; the rest is not read.
            temperature: logits are divided by it.
        Raises:
            ValueError: as `forward_backward`, or a model with a scalar head or on another mesh.
        """
        is_model = isinstance(policy, Pretrained)
        if is_model and (policy.config.scalar_head or policy.layout != self.model.layout):
            raise ValueError("give a state, or a language model that was loaded with the mesh of this engine")
        if not is_model:
            self._check_state(policy)
        config = policy.config if is_model else self.config
        arrays = check_batch({name: batch[name] for name in ("tokens", "mask") if name in batch}, config, learns=False)
        there, num_micro = self._put(arrays)
        scores = self.programs.score(policy.params, there, _positive(temperature), config=config, num_micro=num_micro)
        return hosts.fetch(scores)

    def forward_backward(
        self,
        state: PolicyState,
        batch: Mapping[str, Any],
        loss: Loss,
        *,
        over: Over = "tokens",
        temperature: float = 1.0,
    ) -> tuple[PolicyState, dict[str, jax.Array]]:
        """Add the gradient of a loss to those since the last optimizer step.

        The rows are computed in micro-batches, for each of which the loss function is called with its part of
        every array. `over` says what its loss is a mean over, so that any split of rows into micro-batches and calls is
        one large batch:

            "tokens"  the tokens of its loss mask: the step takes sum_m n_m g_m / sum_m n_m, n_m their number
            "rows"    its rows: the same with the number of rows
            "sum"     nothing, it is a sum: the step takes sum_m g_m

        Metrics are combined as the loss is, over this call. The balance loss of a sparse model is added to each.

        Args:
            batch: "tokens" [B, T] int, "mask" [B, T] bool, true on tokens and false on padding, which is on the right,
                "loss_mask" [B, T] bool, true on tokens that are learned, and any arrays [B, T] or [B, ...] that the
                loss reads; on the host or the devices. The mesh divides the rows of a micro-batch.
            loss: (logprobs [B, T] float32, batch) -> (loss, {name: number}), in JAX; logprobs are those of `score`.
                It is compiled once for each function object and shape: one that is made in the loop, as a lambda,
                is compiled every time, and a value that it reads from outside is that of the first call.
            over: what the loss is a mean over; the same in all calls before a step.
            temperature: logits are divided by it, as in sampling.
        Returns:
            The state, and {"loss", and the metrics}: float32 scalars on the devices. Gradients of the first state, if
            it has some, are deleted.
        Raises:
            ValueError: arrays of wrong names, shapes, dtypes or values, or rows that do not divide; a loss that is
                not a number; another `over` than before; or a state whose memory was taken.
        """
        self._check_state(state)
        if over not in get_args(Over):
            raise ValueError(f'over="{over}": choose among {", ".join(get_args(Over))}')
        if state.over not in ("", over):
            raise ValueError(
                f'over="{over}" after over="{state.over}": their gradients have no common mean, so call '
                'optim_step between them, or give both losses as sums with over="sum"'
            )
        there, num_micro = self._put(check_batch(batch, self.config, learns=True))
        options = dict(loss=loss, over=over, num_micro=num_micro)
        train, divisor = dataclasses.replace(state.train, opt_state=None), _positive(temperature)
        sums, metrics = self.programs.accumulate(train, state.frozen, state.sums, there, divisor, **options)
        return dataclasses.replace(state, sums=sums, over=over), metrics

    def optim_step(self, state: PolicyState) -> tuple[PolicyState, dict[str, jax.Array]]:
        """One optimizer step by the gradients since the last one.

        A step whose loss or gradient is not finite changes no parameter and is counted as skipped.

        Returns:
            The next state, and {"loss", "grad_norm", "skipped_steps"}: the mean (or sum) over all calls, the global
            norm before clipping, and the number of steps skipped so far. The first state is deleted.
        Raises:
            ValueError: no gradients, or a state whose memory was taken.
        """
        self._check_state(state)
        if state.sums is None:
            raise ValueError("there are no gradients to step by: call forward_backward first")
        train, metrics = self.programs.step(state.train, state.sums)
        jax.tree.map(lambda leaf: leaf.delete(), state.sums)  # no output has their memory, so they are not donated
        return PolicyState(train, state.frozen), metrics

    def save_state(
        self, state: PolicyState, folder: str | Path, *, meta: Mapping[str, Any] | None = None, keep: int = 2
    ):
        """Write what trains, with the optimizer's state, to `folder/STEP/`, and return when it is complete.

        The base under adapters is not written, but known again by its bits.

        Args:
            meta: JSON data that `load_state` returns, such as the position in the data.
            keep: number of the newest steps that stay in the folder.
        Raises:
            ValueError: gradients that no step has taken, a step that is not above those in the folder, `keep` below 1,
                or a folder that cannot be written.
        """
        self._check_state(state)
        if state.sums is not None:
            raise ValueError("the state has gradients that no step has taken: call optim_step before save_state")
        step = int(state.train.step)
        with Checkpoints(folder, keep=keep) as checkpoints:
            latest = checkpoints.latest_step()
            if latest is not None and step <= latest:
                raise ValueError(f"{folder} has step {latest}, and this state is of step {step}: give another folder")
            checkpoints.save(step, state.train, {"base": bit_sum(state.frozen), "meta": dict(meta or {})})

    def load_state(self, folder: str | Path, model: Pretrained) -> tuple[PolicyState, dict[str, Any]]:
        """The newest complete state in a folder of `save_state`, and its meta; on any mesh, bit for bit.

        Args:
            model: as `init` takes it; its frozen parameters are used.
        Raises:
            ValueError: no such folder, no complete state in it, one of another architecture, optimizer or base, or a
                damaged file.
        """
        self._check_model(model)
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder: give one that save_state has written")
        shapes, frozen = jax.eval_shape(
            lambda params: self._start(dataclasses.replace(model, params=params)), model.params
        )
        there = state_shardings(shapes, abstract_params(self.config), model.layout)
        abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, there)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore_newest(abstract)
        if restored is None:
            raise ValueError(f"{folder} has no complete state: give a folder that save_state has written")
        _, train, saved = restored
        frozen = {path: model.params[path] for path in frozen}
        if bit_sum(frozen) != saved["base"]:
            raise ValueError(
                f"the adapters in {folder} belong to another base, or to one in another dtype: load that one"
            )
        return PolicyState(train, frozen), saved["meta"]

    def export(
        self,
        state: PolicyState,
        folder: str | Path,
        *,
        adapter: bool = False,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the policy as a Hugging Face folder, adapters merged; or with `adapter` those alone, for PEFT.

        dtype, overwrite, and what is raised: as `save_pretrained` and `save_adapter`.
        """
        self._check_state(state)
        trained = dataclasses.replace(self.model, config=self.config, params=state.params)
        if adapter:
            save_adapter(trained, folder, base=self.model.source, overwrite=overwrite)
        else:
            save_pretrained(trained, folder, dtype=dtype, overwrite=overwrite)

    @property
    def _publisher(self) -> Publish:
        layout = self.model.layout
        return make_publish(self.config, layout.mesh, self.compute.dtype, layout.table)

    def _start(self, model: Pretrained, seed: int = 0) -> tuple[TrainState, Params]:
        return make_train_state(model, self.config, self.tx, self.compute.scaling, seed)

    def _put(self, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
        """The arrays on the devices, and the number of micro-batches."""
        layout, rows = self.model.layout, len(arrays["tokens"])
        size = min(self.micro_batch_size or rows, rows)
        check_divides("rows of a batch", rows, size, "rows of a micro-batch")
        check_divides("rows of a micro-batch", size, layout.shards("batch"), "devices of the mesh")
        return layout.put_batch(arrays), rows // size

    def _check_model(self, model: Pretrained) -> None:
        if model.config != self.model.config or model.layout != self.model.layout:
            raise ValueError("this model has another architecture or mesh: make an engine for it with make_engine")

    def _check_state(self, state: PolicyState) -> None:
        """Raise ValueError for what is no state, and for a state whose arrays a later one has taken."""
        if not isinstance(state, PolicyState):
            raise ValueError(
                f"a {type(state).__name__} is no state of this engine: give what init or load_state returned"
            )
        if any(leaf.is_deleted() for leaf in jax.tree.leaves((state.train, state.sums))):
            raise ValueError(
                "the memory of this state was taken by optim_step or forward_backward: go on with the state that it "
                "returned"
            )


def _positive(temperature: float) -> np.float32:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: above 0; a greedy policy gives no probabilities to learn from")
    return np.float32(temperature)
