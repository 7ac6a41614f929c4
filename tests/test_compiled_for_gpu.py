"""PPO programs as XLA compiles them for eight A100s that are not attached: collectives, memory and custom calls.

Run with `pytest -m cuda` where JAX's CUDA plugin is installed; no GPU is needed or used.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny

from rlhf_jax.collectives import instructions, received_bytes, run_counts
from rlhf_jax.decode import Rollout
from rlhf_jax.engine import (
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.hardware import COMPILE_OPTIONS, RUN_OPTIONS, compile_only_devices
from rlhf_jax.mesh import GENERATE, TRAIN, WHOLE, Layout, MeshConfig, make_mesh, train_layout
from rlhf_jax.models import inference
from rlhf_jax.models.config import Compute, Experts, Rope
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.inference import shared_shardings
from rlhf_jax.models.lora import NO_LORA, LoraConfig, is_adapter, is_trainable
from rlhf_jax.models.quantised import is_quantisable
from rlhf_jax.models.unstacked import Unstacked, is_shareable
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.rollout import make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.skipping import no_skips
from rlhf_jax.stages.ppo import ppo_algorithm
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.train_step import TrainState, state_shardings
from rlhf_jax.trees import partition

pytestmark = pytest.mark.cuda

BFLOAT16 = jnp.dtype("bfloat16")
# Two layers of usual width, so that no activation of a decode step is as large as the smallest weight.
SIZES = dict(vocab_size=8192, padded_vocab=8192, hidden_size=1024, embed_size=1024, num_layers=2, head_dim=64)
SIZES |= dict(num_heads=16, max_positions=2048, attention_scale=0.125)
OPT = dataclasses.replace(tiny.OPT, **SIZES, num_kv_heads=16, mlp_size=4096, position_rows=2050)
ROPE = Rope(tuple(10_000 ** (-n / 32) for n in range(32)))
LLAMA = dataclasses.replace(tiny.LLAMA, **SIZES, num_kv_heads=8, mlp_size=2816, rope=ROPE)
SPARSE = dataclasses.replace(LLAMA, family="mixtral", experts=Experts(4, 2, renormalised=True, aux_coef=0.02))
LORA = LoraConfig(rank=8)
CASES = {"llama": (LLAMA, NO_LORA), "opt-lora": (OPT, LORA), "sparse": (SPARSE, NO_LORA), "sparse-lora": (SPARSE, LORA)}
ONE_COPY = {"llama-one-copy": (LLAMA, LORA), "opt-one-copy": (OPT, LORA)}
# Wider, so that the weights of no two layers are gathered together; one micro-batch, because a loop copies its inputs.
WIDE = dict(hidden_size=4096, embed_size=4096, head_dim=128, num_heads=32)
DEEP = {
    f"{name}-{layers}-layers": (dataclasses.replace(config, **WIDE, mlp_size=mlp, num_layers=layers), LORA)
    for name, config, mlp in (("llama", LLAMA, 11264), ("opt", dataclasses.replace(OPT, num_kv_heads=32), 16384))
    for layers in (4, 8)
}
ALL = CASES | ONE_COPY | DEEP
ROWS, PROMPT, NEW, CHUNK, MICRO = 32, 128, 128, 64, 2


def shape_dtype(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def one_copy(config, frozen, layout):
    """The frozen weights, sharded as generation shares them."""
    shared = dict(frozen)
    for path in filter(is_shareable, frozen):
        leaf = frozen[path]
        if is_quantisable(path):
            leaf = Unstacked((jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),) * leaf.shape[0])
        shared[path] = with_shardings(leaf, shared_shardings(config, path, leaf, layout))
    return shared


def with_shardings(tree, shardings):
    return jax.tree.map(lambda leaf, sharding: shape_dtype(leaf.shape, leaf.dtype, sharding), tree, shardings)


def rows(layout, shape, dtype):
    return shape_dtype(shape, dtype, layout.sharding(("batch", *[None] * (len(shape) - 1))))


def params_of(config, lora, layout, dtype):
    return {
        path: shape_dtype(x.shape, dtype, layout.sharding(x.axes))
        for path, x in abstract_params(tiny.with_lora(config, lora)).items()
    }


def state_of(config, lora, layout, tx):
    params = params_of(config, lora, layout, jnp.float32)
    trainable, frozen = partition(params, lambda path: is_trainable(path, lora))
    frozen = {path: shape_dtype(x.shape, BFLOAT16, x.sharding) for path, x in frozen.items()}
    skips = jax.eval_shape(lambda: no_skips(len(trainable)))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(tx.init, trainable), skips)
    return with_shardings(state, state_shardings(state, abstract_params(tiny.with_lora(config, lora)), layout)), frozen


@contextlib.contextmanager
def capture_stderr():
    """A list that receives what the compiler writes to stderr while the block runs."""
    reported, before = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield reported
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            reported.append(file.read().decode(errors="replace"))


class Program(NamedTuple):
    text: str
    memory: Any
    reported: str


def compile_program(lowered) -> Program:
    with capture_stderr() as reported:
        done = lowered.compile(COMPILE_OPTIONS)
    return Program(done.as_text(), done.memory_analysis(), reported[0])


@functools.lru_cache
def mesh():
    return make_mesh(MeshConfig(1, 4, 2), compile_only_devices("8xA100-80GB"))


@functools.lru_cache
def parts(case, zero=3, offload=False):
    """(engine, state, frozen, sharded weights for decoding), all abstract; ONE_COPY and DEEP share the base."""
    config, lora = ALL[case]
    critic = tiny.scalar(dataclasses.replace(config, num_layers=2))
    tx, num_micro = make_optimizer(OptimConfig(1e-5), 10), 1 if case in DEEP else MICRO
    train = train_layout(mesh(), zero, offload_moments=offload)
    engine = make_hybrid_engine(
        Architectures(tiny.with_lora(config, lora), critic, config, critic),
        ppo_algorithm(PPOConfig()),
        Optimizers(tx, tx),
        Sampling(SampleConfig(NEW), (2,)),
        Execution(train, Compute(BFLOAT16, "layers", CHUNK), num_micro, num_micro),
    )
    actor_state, actor_frozen = state_of(config, lora, train, tx)
    critic_state, critic_frozen = state_of(critic, NO_LORA, train, tx)
    serve = Layout(mesh(), GENERATE)
    if case in ONE_COPY | DEEP:
        actor_frozen = one_copy(config, actor_frozen, serve)
    reference = {} if lora.rank else params_of(config, NO_LORA, train, BFLOAT16)
    state = EngineState(actor_state, critic_state)
    frozen = FrozenParams(actor_frozen, critic_frozen, reference, params_of(critic, NO_LORA, train, BFLOAT16))
    params = state.actor.params(frozen.actor)
    weights = jax.eval_shape(engine.publish.program, params)
    shardings = engine.publish.lower(params).compile(COMPILE_OPTIONS).output_shardings
    weights = with_shardings(weights, shardings)
    weights |= inference.shared_inference_weights(config, params, serve, lambda leaf, where: leaf)
    return engine, state, frozen, weights


@functools.lru_cache
def program(case, name, zero=3, offload=False) -> Program:
    engine, state, frozen, weights = parts(case, zero, offload)
    config, _ = ALL[case]
    serve, train = Layout(mesh(), GENERATE), Layout(mesh(), TRAIN)
    wide = [((ROWS, PROMPT), jnp.int32), ((ROWS, PROMPT), bool), ((ROWS, NEW), jnp.int32), ((ROWS, NEW), bool)]
    numbers, ended, ends = ((ROWS, NEW), jnp.float32), ((ROWS,), bool), ((ROWS,), jnp.int32)
    rollout = Rollout(*(rows(serve, *x) for x in [*wide, numbers, ended, numbers, ends]))
    if name == "publish":
        return compile_program(engine.publish.lower(state.actor.params(frozen.actor)))
    if name == "generate":
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = shape_dtype(key.shape, key.dtype, serve.sharding(()))
        return compile_program(engine.programs.generate.lower(weights, rollout.prompts, rollout.prompt_mask, key))
    if name == "score":
        return compile_program(engine.programs.score.lower(state, frozen, rollout, None))
    scored = jax.eval_shape(engine.programs.score.__wrapped__, state, frozen, rollout, None)
    experience = jax.tree.map(lambda x: rows(train, x.shape, x.dtype), scored)
    if name == "actor":
        return compile_program(engine.programs.actor.lower(state.actor, frozen.actor, experience))
    if name.startswith("step "):
        update = engine.programs.actor
        return compile_program(update.step.lower(*update.arguments(state.actor, name.removeprefix("step "))))
    assert name == "update"
    return compile_program(
        jax.jit(both_steps(engine), donate_argnums=0, compiler_options=RUN_OPTIONS).lower(state, frozen, experience)
    )


def both_steps(engine):
    """The steps of actor and critic as one function; a program with compiler options cannot be called inside jit."""

    def run(state, frozen, experience):
        states, reported = {}, {}
        for name in ("actor", "critic"):
            step = getattr(engine.programs, name).__wrapped__
            states[name], reported[name] = step(getattr(state, name), getattr(frozen, name), experience)
        return dataclasses.replace(state, **states), reported

    return run


def split_leaves(config, lora=NO_LORA):
    layout = Layout(mesh(), TRAIN)
    return {
        path: leaf
        for path, leaf in abstract_params(tiny.with_lora(config, lora)).items()
        if any(layout.spec(leaf.axes))
    }


@pytest.mark.parametrize("case", CASES)
def test_publish_is_one_bfloat16_all_gather_per_sharded_weight_and_nothing_else(case):
    text = program(case, "publish").text
    assert tiny.collective_kinds(text) == {"all-gather"}
    split, layouts = split_leaves(CASES[case][0]), [Layout(mesh(), table) for table in (TRAIN, GENERATE)]
    assert [dtype for dtype, _ in tiny.collective_shapes(text, "all-gather")] == ["bf16"] * len(split)
    lacking = 0  # (t - tg) / (t tg) of each weight
    for leaf in split.values():
        t, tg = (math.prod(layout.shards(axis) for axis in leaf.axes if axis) for layout in layouts)
        lacking += 2 * math.prod(leaf.shape) * (t - tg) // (t * tg)
    assert received_bytes(text) == lacking


@pytest.mark.parametrize("case", ONE_COPY)
def test_publish_of_one_copy_gathers_only_the_adapters(case):
    config, lora = ONE_COPY[case]
    text, layout = program(case, "publish").text, Layout(mesh(), TRAIN)
    split = {
        path: leaf
        for path, leaf in abstract_params(tiny.with_lora(config, lora)).items()
        if any(layout.spec(leaf.axes))
    }
    wanted = [path for path in split if is_adapter(path) or not is_shareable(path)]
    assert tiny.collective_kinds(text) == {"all-gather"}
    assert [dtype for dtype, _ in tiny.collective_shapes(text, "all-gather")] == ["bf16"] * len(wanted)
    assert received_bytes(text) < 2 * sum(math.prod(split[path].shape) for path in wanted)


@pytest.mark.parametrize("name", ["score", "update"])
@pytest.mark.parametrize("case", CASES | ONE_COPY)
def test_no_weight_is_gathered_in_float32(case, name):
    gathered = tiny.collective_shapes(program(case, name).text, "all-gather")
    assert sum(dtype == "bf16" for dtype, _ in gathered) >= 7, "at least the weights of a layer"
    # Other float32 gathers have at most one number per action.
    assert [shape for dtype, shape in gathered if dtype == "f32" and math.prod(shape) > ROWS * NEW] == []


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_sharded_weights_are_reduce_scattered_and_none_of_a_matrix_is_all_reduced(case):
    config, lora = CASES[case]
    text, layout = program(case, "update").text, Layout(mesh(), TRAIN)
    expected = Counter()
    for role, adapters in ((config, lora), (tiny.scalar(config), NO_LORA)):
        for path, leaf in split_leaves(role, adapters).items():
            # For embedding tables, every device computes the gradient of its own rows.
            if path.startswith("layers/") and is_trainable(path, adapters):
                shard = layout.sharding(leaf.axes).shard_shape(leaf.shape)[1:]
                expected[tuple(sorted(size for size in shard if size > 1))] += 1
    scattered = Counter(
        tuple(sorted(n for n in shape if n > 1)) for _, shape in tiny.collective_shapes(text, "reduce-scatter")
    )
    assert expected and not expected - scattered
    smallest = min(math.prod(leaf.shape[1:]) for path, leaf in abstract_params(config).items() if "q/kernel" in path)
    assert [shape for _, shape in tiny.collective_shapes(text, "all-reduce") if math.prod(shape) >= smallest // 2] == []


def layer_shapes(layout):
    """Counts the shapes, without sizes of 1, of the shards that a device has of the sharded layer weights of LLAMA."""
    shapes = Counter()
    for path, leaf in split_leaves(LLAMA).items():
        if path.startswith("layers/"):
            shape = layout.sharding(leaf.axes).shard_shape(leaf.shape)[1:]
            shapes[tuple(sorted(size for size in shape if size > 1))] += 1
    return shapes


def moved_shapes(text, kind):
    return Counter(tuple(sorted(n for n in shape if n > 1)) for _, shape in tiny.collective_shapes(text, kind))


def test_at_zero_stage_2_gradients_are_reduce_scattered_and_new_parameters_gathered_once():
    text, train, whole = program("llama", "actor", 2).text, Layout(mesh(), TRAIN), Layout(mesh(), WHOLE)
    assert not layer_shapes(train) - moved_shapes(text, "reduce-scatter")
    smallest = math.prod(min(layer_shapes(train), key=math.prod))
    assert [shape for _, shape in tiny.collective_shapes(text, "all-reduce") if math.prod(shape) >= smallest] == []
    # The compiler may transpose the arrays that it moves.
    gathered = [
        shape
        for dtype, shape in tiny.collective_shapes(text, "all-gather")
        if dtype == "f32" and math.prod(shape) > ROWS * NEW
    ]
    wanted = [whole.sharding(leaf.axes).shard_shape(leaf.shape) for leaf in split_leaves(LLAMA).values()]
    assert Counter(map(tuple, map(sorted, gathered))) == Counter(map(tuple, map(sorted, wanted)))


def test_at_zero_stages_0_and_1_gradients_are_all_reduced():
    # At once, or per layer as its backward pass computes them.
    wanted = sum(count * math.prod(shape) for shape, count in layer_shapes(Layout(mesh(), WHOLE)).items())
    for zero in (0, 1):
        reduced = [
            math.prod(shape) for _, shape in tiny.collective_shapes(program("llama", "actor", zero).text, "all-reduce")
        ]
        assert sum(reduced) >= wanted, zero


def test_a_lower_zero_stage_needs_more_memory_per_device():
    needs = []
    for zero in (3, 2, 1, 0):
        memory = program("llama", "actor", zero).memory
        needs.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    assert needs == sorted(needs) and len(set(needs)) == 4, needs


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("case", ["llama", "opt-lora"])
def test_publish_moves_nothing_when_parameters_are_not_sharded_over_fsdp(case, zero):
    assert tiny.collective_kinds(program(case, "publish", zero).text) == set()


def state_bytes(*trees):
    leaves = jax.tree.leaves(trees)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_state_of_every_zero_stage_is_donated_and_reused(zero):
    (_, state, _, _), memory = parts("llama", zero), program("llama", "actor", zero).memory
    assert memory.alias_size_in_bytes >= state_bytes(state.actor)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**14, "the metrics"


@pytest.mark.parametrize("zero", [1, 3])
def test_with_offloading_the_gradient_program_has_no_moments_and_a_step_reuses_its_parameter_and_moments(zero):
    (engine, state, _, _), path = parts("llama", zero, True), "layers/mlp/up/kernel"
    update, fused = engine.programs.actor, program("llama", "actor", zero).memory
    param, grad, moments, _ = update.arguments(state.actor, path)
    assert state_bytes(moments) == 2 * state_bytes(grad)
    gradients = program("llama", "actor", zero, True).memory
    assert gradients.argument_size_in_bytes <= fused.argument_size_in_bytes - state_bytes(state.actor.opt_state) + 64
    peak = gradients.temp_size_in_bytes + gradients.output_size_in_bytes
    assert peak <= 1.02 * fused.temp_size_in_bytes + 2**14, "no second copy of the gradients"
    step = program("llama", f"step {path}", zero, True).memory
    assert step.alias_size_in_bytes >= state_bytes(param, moments)
    assert step.output_size_in_bytes - step.alias_size_in_bytes < 64, "the counters"
    if zero == 3:
        assert step.temp_size_in_bytes < 0.02 * state_bytes(param)


@pytest.mark.parametrize("case", ONE_COPY)
def test_training_over_one_copy_gathers_the_tensor_shard_of_each_kernel_and_keeps_no_gradient_of_it(case):
    (_, state, frozen, _), reported = parts(case), program(case, "actor")
    gathered = [shape for dtype, shape in tiny.collective_shapes(reported.text, "all-gather") if dtype == "bf16"]
    widest = max(math.prod(leaf.shape[1:]) for path, leaf in frozen.actor.items() if is_quantisable(path))
    assert any(math.prod(shape) == widest for shape in gathered)
    base = state_bytes([leaf for path, leaf in frozen.actor.items() if is_quantisable(path)])
    assert reported.memory.alias_size_in_bytes >= state_bytes(state.actor)
    assert reported.memory.temp_size_in_bytes < 60 * base, "temporaries are below 60 times the base"


def added_by_a_layer(family, name):
    """Bytes of temporaries that each further layer adds to a program over one copy."""
    few, many = (program(f"{family}-{layers}-layers", name).memory.temp_size_in_bytes for layers in (4, 8))
    return (many - few) / 4


def test_scoring_over_one_copy_keeps_no_gathered_kernels_between_the_passes_of_actor_and_reference():
    frozen = parts("llama-4-layers")[2].actor
    kernels = sum(2 * math.prod(leaf.shape[1:]) for path, leaf in frozen.items() if is_quantisable(path))
    assert added_by_a_layer("llama", "score") < 0.05 * kernels


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_training_over_one_copy_keeps_per_layer_its_input_and_the_gradients_of_its_adapters(family):
    inputs = 2 * ROWS * (PROMPT + NEW) // Layout(mesh(), TRAIN).shards("batch") * WIDE["hidden_size"]
    assert inputs <= added_by_a_layer(family, "actor") < 1.5 * inputs


@pytest.mark.parametrize("case", CASES)
def test_the_train_state_is_donated_and_every_byte_of_it_reused(case):
    memory, (_, state, _, _) = program(case, "update").memory, parts(case)
    assert memory.alias_size_in_bytes >= state_bytes(state)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**14, "the metrics"


@pytest.mark.parametrize("name", ["publish", "generate", "score", "update"])
@pytest.mark.parametrize("case", CASES | ONE_COPY)
def test_no_program_has_an_involuntary_full_rematerialisation(case, name):
    assert "nvoluntary full rematerialization" not in program(case, name).reported


def test_an_involuntary_full_rematerialisation_would_be_detected():
    layout = Layout(mesh(), TRAIN)
    x = shape_dtype((1024, 1024), BFLOAT16, layout.sharding(("mlp", None)))
    moving = jax.jit(lambda x: Layout(mesh(), GENERATE).constrain(x * 2, None, "mlp"))
    assert "nvoluntary full rematerialization" in compile_program(moving.lower(x)).reported


def runs_of_fused_attention(text: str) -> Counter:
    """Executions of cuDNN's calls by kind; XLA may peel an iteration off a loop and write its calls twice."""
    often, calls = run_counts(text), Counter()
    for computation, _, _, line in instructions(text):
        if found := re.search(r'custom_call_target="__cudnn\$fmha(\w+)"', line):
            calls[found[1]] += often[computation]
    return calls


@pytest.mark.parametrize("case", CASES)
def test_attention_is_cudnns_in_every_program_over_whole_rows(case):
    names, layers = ("generate", "score", "update"), CASES[case][0].num_layers
    calls = {name: runs_of_fused_attention(program(case, name).text) for name in names}
    each = layers * MICRO  # layers of one model, over the micro-batches
    assert calls["generate"] == {"Softmax": layers}, "the prefill"
    assert calls["score"] == {"Softmax": 4 * each}, "once in each layer of four models"
    assert calls["update"] == {"Softmax": 4 * each, "SoftmaxBackward": 2 * each}, "forward, recomputed, and backward"
    for name in ("score", "update"):
        assert f"{PROMPT + NEW},{PROMPT + NEW}]" not in program(case, name).text, "scores or mask in memory"


def loops(text: str) -> list[list[tuple[str, str, int, str]]]:
    """For each while loop, (name, operation, elements of the largest result, line) of the instructions in its body."""
    bodies, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = bodies.setdefault(head[1], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line):
            arrays = re.findall(r"\[([\d,]+)\]", re.sub(r"\{[^{}]*\}", "", found[2]))
            largest = max((math.prod(map(int, dims.split(","))) for dims in arrays), default=0)
            current.append((found[1], found[3], largest, line))

    def runs(name):
        own = bodies[name]
        called = [
            c for _, op, _, line in own if op in ("call", "conditional") for c in re.findall(r"=%([\w.\-]+)", line)
        ]
        return own + [each for c in called if c in bodies for each in runs(c)]

    return [runs(body) for body in re.findall(r" while\(.*?body=%([\w.\-]+)", text)]


@pytest.mark.parametrize("case", CASES | ONE_COPY)
def test_no_decode_step_copies_an_array_as_large_as_a_weight(case):
    *_, weights = parts(case)
    smallest = min(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in weights.items()
        if path.endswith(("kernel", "rows")) and "router" not in path
    )
    decoding = max(loops(program(case, "generate").text), key=len)
    assert any(op == "fusion" for _, op, _, _ in decoding)
    nothing = ("parameter", "get-tuple-element", "tuple", "bitcast", "while")
    large = [(name, line) for name, op, size, line in decoding if size >= smallest and op not in nothing]
    # The cache is updated in place.
    assert [line for name, line in large if "dynamic_update_slice" not in name] == []


@pytest.mark.parametrize("family", [OPT, LLAMA, SPARSE], ids=lambda config: config.family)
def test_the_decode_loop_needs_little_memory_besides_its_cache(family):
    config = dataclasses.replace(family, num_layers=16)  # temporaries are those of one layer
    params, publish = (
        params_of(config, NO_LORA, Layout(mesh(), TRAIN), BFLOAT16),
        make_publish(config, mesh(), BFLOAT16),
    )
    shardings = publish.lower(params).compile(COMPILE_OPTIONS).output_shardings
    weights = with_shardings(jax.eval_shape(publish, params), shardings)
    layout, length = Layout(mesh(), GENERATE), PROMPT + NEW
    entries, flags = layout.sharding(("batch", "kv_heads", None, None)), layout.sharding(("batch", None))
    cache = jax.eval_shape(lambda: inference.empty_cache(config, 8 * ROWS, length, BFLOAT16, layout))
    shardings = inference.Cache(*((entries,) * config.num_layers,) * 2, flags)
    cache, token = with_shardings(cache, shardings), shape_dtype((8 * ROWS, 1), jnp.int32, flags)

    model = inference.Inference(config, layout, BFLOAT16)

    def decode(weights, cache, token):
        def step(state):
            t, token, cache = state
            real, positions = jnp.ones(token.shape, bool), jnp.full(token.shape, t)
            hidden, cache = inference.forward(model, weights, token, real, positions, cache, t)
            token = jnp.argmax(inference.inference_logits(config, weights, hidden[:, -1]), axis=-1)[:, None]
            return t + 1, token.astype(jnp.int32), cache

        return jax.lax.while_loop(lambda state: state[0] < length, step, (jnp.int32(PROMPT), token, cache))

    memory = compile_program(jax.jit(decode, donate_argnums=1).lower(weights, cache, token)).memory
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.05 * size
