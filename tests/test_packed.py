"""Rows of several documents: logits, gradients and loss equal those of each document alone; none attends to another."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.data.batches import Batch
from rlhf_jax.data.packing import pack
from rlhf_jax.hardware import COMPILE_OPTIONS, compile_only_devices
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh, single_device_mesh
from rlhf_jax.models import decoder, transformer
from rlhf_jax.models.attention import AttentionKernel
from rlhf_jax.models.config import Alibi, Compute, Rope
from rlhf_jax.models.decoder import abstract_params, bind, logits
from rlhf_jax.models.layers import token_positions, visible_keys
from rlhf_jax.models.lora import is_trainable
from rlhf_jax.objectives.sft import next_token_loss
from rlhf_jax.stages.from_scratch import train_tokenizer
from rlhf_jax.stages.models import ModelConfig, log_attention
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.stages.supervised import make_programs
from rlhf_jax.train_step import init_state
from rlhf_jax.trees import partition

REAL = Path(__file__).parents[2] / "shared" / "data" / "alpaca-eval-preferences" / "train.jsonl"
needs_real_data = pytest.mark.skipif(not REAL.is_file(), reason=f"no real data at {REAL}")

SLOPES = tuple(2.0 ** -(i + 1) for i in range(4))
BLOOM = dataclasses.replace(tiny.OPT, family="bloom", embed_norm=True, position_rows=0, position_offset=0)
FAMILIES = {
    **tiny.FAMILIES,
    "windowed": dataclasses.replace(tiny.LLAMA, windows=(5, 5)),
    # Gemma: windows in some layers, which have their own rotary embedding, and soft-capped scores.
    "alternating": dataclasses.replace(
        tiny.LLAMA, windows=(0, 5), local_rope=Rope((0.7, 0.3, 0.05, 0.01)), attention_softcap=2.0, final_softcap=5.0
    ),
    "bloom": dataclasses.replace(BLOOM, alibi=Alibi(SLOPES)),
    # ALiBi slopes whose products with positions are rounded, so that positions must start at each document.
    "falcon": dataclasses.replace(
        BLOOM, embed_norm=False, alibi=Alibi((0.71, 0.53, 0.37, 0.19), scale=8**-0.5, rounded=True)
    ),
}
in_every_family = pytest.mark.parametrize("family", FAMILIES)
# Documents in rows of 48 tokens, more than the 40 positions of OPT; the second row has 9 tokens of padding.
ROWS = [[11, 1, 20, 16], [30, 9]]
WIDTH, LONGEST = 48, 30
LENGTHS = [length for row in ROWS for length in row]


def pack_documents(documents: list[np.ndarray], rows=ROWS, width=WIDTH):
    """(tokens, mask, segments), [B, width]: `documents` end to end, in each row as many as its list of lengths has."""
    numbers = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    segments = np.stack([np.pad(each, (0, width - len(each))) for each in numbers]).astype(np.int32)
    tokens = np.zeros(segments.shape, np.int32)
    tokens[segments > 0] = np.concatenate(documents)
    return tokens, segments > 0, segments


def pad_documents(documents: list[np.ndarray], width=LONGEST):
    """(tokens, mask), [documents, width]: each document in its own row, padded on the right."""
    mask = np.arange(width) < np.array([len(document) for document in documents])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(documents)
    return tokens, mask


def documents_of(config, lengths=LENGTHS, seed=1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]


@functools.partial(jax.jit, static_argnames=("config", "layout", "attention", "remat"))
def logits_of(config, params, tokens, mask, segments=None, layout=None, attention="xla", remat="none"):
    compute = Compute(jnp.float32, remat, attention=attention)
    return logits(config, params, bind(config, params)(tokens, mask, compute, layout, segments)[0])


def test_positions_restart_in_every_document_and_padding_has_a_position_within_the_table():
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 2, 2, 2], [1] * 8], np.int32)
    expected = [[0, 1, 2, 0, 0, 1, 1, 1], [0, 0, 0, 1, 2, 0, 1, 2], list(range(8))]
    np.testing.assert_array_equal(token_positions(segments > 0, segments), expected)


def test_a_token_attends_to_itself_and_earlier_tokens_of_its_document_and_nothing_else():
    segments = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    expected = ["100000", "110000", "001000", "001100", "001110", "000000"]
    seen = np.asarray(visible_keys(segments > 0, segments))[0]
    assert ["".join(str(int(x)) for x in row) for row in seen] == expected


@in_every_family
def test_logits_of_a_packed_document_equal_those_of_the_document_alone(family):
    config = FAMILIES[family]
    params, documents = tiny.random_params(config, single_device_mesh()), documents_of(config)
    tokens, mask, segments = pack_documents(documents)
    together = np.asarray(logits_of(config, params, tokens, mask, segments))
    assert np.isfinite(together).all()
    rows, real = pad_documents(documents)
    apart = np.asarray(logits_of(config, params, rows, real))[real]
    np.testing.assert_allclose(together[mask], apart, atol=2e-5)
    # Without segments the second document of the second row attends to the first, which changes its logits.
    merged = np.asarray(logits_of(config, params, tokens[1:], mask[1:]))[0, 30:39]
    assert np.abs(merged - apart[-9:]).max() > 0.1


@in_every_family
def test_changing_one_document_changes_no_logit_of_the_others(family):
    config = FAMILIES[family]
    params, documents = tiny.random_params(config, single_device_mesh()), documents_of(config)
    changed = [*documents]
    changed[2] = (documents[2] + 1) % config.vocab_size  # the third of the first row, followed by another
    one, two = (np.asarray(logits_of(config, params, *pack_documents(x))) for x in (documents, changed))
    _, mask, segments = pack_documents(documents)
    touched = np.zeros_like(mask)
    touched[0] = segments[0] == 3
    np.testing.assert_array_equal(one[mask & ~touched], two[mask & ~touched])
    assert (np.abs(one - two)[touched].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        *((family, "layers") for family in FAMILIES),
        ("llama", "none"),
        ("llama", "dots"),
    ],
)
def test_gradients_of_a_packed_row_are_the_sum_over_its_documents(family, remat):
    config = FAMILIES[family]
    params, documents = tiny.random_params(config, single_device_mesh()), documents_of(config)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradients(params, tokens, mask, learned, segments=None, remat="none"):
        def summed_loss(params):
            scores = logits_of(config, params, tokens, mask, segments, remat=remat)[:, :-1]
            return next_token_loss(scores, tokens[:, 1:], learned[:, 1:]) * learned.sum()

        return jax.grad(summed_loss)(params)

    tokens, mask, segments = pack_documents(documents)
    together = gradients(params, tokens, mask, mask & (token_positions(mask, segments) > 0), segments, remat=remat)
    rows, real = pad_documents(documents)
    apart = gradients(params, rows, real, real & (np.arange(LONGEST) > 0))
    for path, gradient in apart.items():
        largest = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(together[path], gradient, atol=2e-5 * max(1, largest), err_msg=path)


def training_batches(config, documents, rows, width):
    """The documents as (batch of packed rows, batch of rows of one document); all but the first tokens have a loss."""
    tokens, mask, segments = pack_documents(documents, rows, width)
    loss_mask = mask & (np.asarray(token_positions(mask, segments)) > 0)
    apart, real = pad_documents(documents)
    return Batch(tokens, mask, loss_mask, segments), Batch(apart, real, real & (np.arange(LONGEST) > 0))


# 16 documents of 3 to 30 tokens, unevenly, in 8 rows, for 8 devices and for two micro-batches on one.
EIGHT_ROWS = [[30, 9], [3, 12, 20], [25], [4, 4, 4], [7, 30], [18, 2], [17, 16], [5]]
EIGHT_ROWS += [[length + 1 for length in row[:1]] for row in reversed(EIGHT_ROWS) if row[0] < 30][:6] + [[8, 8], [9]]


class Program:
    """One SFT update of a tiny model on one mesh, with plain SGD, so that parameters show the gradients."""

    def __init__(self, family: str, mesh: str, num_micro: int):
        self.config, self.layout = FAMILIES[family], Layout(tiny.mesh_of(mesh), TRAIN)
        self.leaves, self.tx = abstract_params(self.config), optax.sgd(0.1)
        compute = Compute(jnp.dtype("float32"), "layers", 16)
        objective = sft_objective(self.config, compute, self.layout)
        self.update, self.measure = make_programs(objective, self.config, self.layout, self.tx, num_micro)

    def run(self, batch: Batch):
        """(parameters after the update, its loss, the evaluation loss, the number of tokens with loss)."""
        params = tiny.random_params(self.config, self.layout.mesh)
        there = self.layout.put_batch(batch)
        measured, _, count = jax.device_get(self.measure(params, there))
        trainable, frozen = partition(params, lambda path: is_trainable(path, self.config.lora))
        state, stats = self.update(init_state(trainable, self.tx, self.leaves, self.layout), frozen, there)
        return jax.device_get((state.params(frozen), stats["loss"])) + (measured, count)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_an_update_on_packed_rows_equals_that_on_separate_documents_on_eight_devices_and_on_one(family):
    documents = documents_of(FAMILIES[family], [length for row in EIGHT_ROWS for length in row])
    batch, apart = training_batches(FAMILIES[family], documents, EIGHT_ROWS, WIDTH)
    assert len(batch.tokens) == 16
    params, loss, measured, count = Program(family, "one", 1).run(apart)
    for mesh, num_micro in (("one", 4), ("fsdp4-tensor2", 2)):
        got, *numbers = Program(family, mesh, num_micro).run(batch)
        np.testing.assert_allclose(numbers, [loss, measured, count], rtol=1e-5)
        for path, leaf in params.items():
            np.testing.assert_allclose(got[path], leaf, atol=2e-5, err_msg=f"{path} {mesh} {num_micro}")


def test_a_sparse_model_routes_packed_rows_on_eight_devices_as_on_one():
    documents = documents_of(tiny.SPARSE, [length for row in EIGHT_ROWS for length in row])
    batch, apart = training_batches(tiny.SPARSE, documents, EIGHT_ROWS, WIDTH)
    one, eight, alone = (
        Program("sparse", mesh, 1).run(x) for mesh, x in (("one", batch), ("fsdp4-tensor2", batch), ("one", apart))
    )
    # The balance loss is over all real tokens, so it equals that of the same documents in separate rows.
    for other in (eight, alone):
        np.testing.assert_allclose(other[1:], one[1:], rtol=1e-5)
        for path, leaf in one[0].items():
            np.testing.assert_allclose(other[0][path], leaf, atol=2e-5, err_msg=path)


def test_the_last_token_of_a_document_is_not_trained_to_predict_the_first_of_the_next():
    config, documents = FAMILIES["llama"], documents_of(FAMILIES["llama"])
    batch, _ = training_batches(config, documents, ROWS, WIDTH)
    firsts = np.cumsum([0, *ROWS[0][:-1]])
    assert not batch.loss_mask[0, firsts].any() and batch.loss_mask.sum() == sum(LENGTHS) - len(LENGTHS)
    program = Program("llama", "one", 1)
    params = tiny.random_params(config, program.layout.mesh)
    loss, _, count = program.measure(params, batch)
    rows, real = pad_documents(documents)
    logprobs = jax.nn.log_softmax(logits_of(config, params, rows, real))
    each = [-logprobs[i, t, document[t + 1]] for i, document in enumerate(documents) for t in range(len(document) - 1)]
    assert count == len(each)
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)


def test_a_batch_without_segments_puts_no_array_for_them_on_the_devices():
    batch, apart = training_batches(tiny.OPT, documents_of(tiny.OPT), ROWS, WIDTH)
    layout = Layout(single_device_mesh(), TRAIN)
    assert [len(jax.tree.leaves(layout.put_batch(x))) for x in (batch, apart)] == [4, 3]
    assert layout.put_batch(apart).segments is None
    assert layout.put_batch(batch).segments.dtype == jnp.int32


def test_packed_rows_use_masked_attention_where_other_rows_use_fused_attention(monkeypatch):
    def choose(mesh, config, dtype, length, choice, packed=False):
        return AttentionKernel("xla" if packed else "cudnn", "")

    def fail(*arrays, **options):
        raise AssertionError("fused attention keeps no documents apart")

    monkeypatch.setattr(decoder, "kernel_for_mesh", choose)
    monkeypatch.setattr(transformer, "fused_attention", fail)
    config, documents = tiny.LLAMA, documents_of(tiny.LLAMA)
    layout = Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(config, layout.mesh)
    # With remat="dots", so that no program compiled by another test is reused.
    got = logits_of(config, params, *pack_documents(documents), layout=layout, attention="auto", remat="dots")
    np.testing.assert_allclose(got, logits_of(config, params, *pack_documents(documents)), atol=1e-5)
    with pytest.raises(AssertionError, match="keeps no documents apart"):
        logits_of(config, params, *pad_documents(documents), layout=layout, attention="auto", remat="dots")


def on_gpus(attention: str):
    """(the parts of a model on a GPU that `log_attention` reads, settings that compute in bfloat16)."""
    device = SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="A100")
    mesh = SimpleNamespace(devices=np.array([device]))
    return SimpleNamespace(layout=SimpleNamespace(mesh=mesh), config=tiny.LLAMA), ModelConfig(attention=attention)


def test_a_run_on_gpus_logs_that_attention_is_xlas_because_rows_are_packed(caplog):
    with caplog.at_level("INFO", "rlhf_jax"):
        for rows_packed in (False, True):
            log_attention("sft", *on_gpus("auto"), 1024, packed=rows_packed)
    fused, not_fused = caplog.messages
    assert fused == "sft: attention: cuDNN for training (bfloat16, causal)"
    assert not_fused.startswith("sft: attention: XLA (rows are packed")


def test_requested_fused_attention_is_rejected_for_packed_rows_with_the_fix():
    log_attention("sft", *on_gpus("cudnn"), 1024)
    with pytest.raises(ValueError, match="rows are packed") as error:
        log_attention("sft", *on_gpus("cudnn"), 1024, packed=True)
    assert 'set it to "auto" or "xla"' in str(error.value)


@pytest.mark.cuda
def test_on_an_a100_attention_is_fused_for_rows_of_one_document_and_not_for_packed_rows():
    layout = Layout(make_mesh(MeshConfig(1, 1, 1), compile_only_devices("1xA100-80GB")), TRAIN)
    config = dataclasses.replace(tiny.LLAMA, head_dim=64, max_positions=256)
    objective = sft_objective(config, Compute(jnp.dtype("bfloat16"), "layers", 64), layout)
    _, measure = make_programs(objective, config, layout, optax.sgd(0.1), 1)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=layout.sharding(leaf.axes))
        for path, leaf in abstract_params(config).items()
    }

    def calls(*dtypes) -> int:
        where = layout.sharding(("batch", None))
        batch = Batch(*(jax.ShapeDtypeStruct((4, 256), dtype, sharding=where) for dtype in dtypes))
        return measure.lower(params, batch).compile(COMPILE_OPTIONS).as_text().count("__cudnn$fmha")

    assert calls(jnp.int32, bool, bool) > 0
    assert calls(jnp.int32, bool, bool, jnp.int32) == 0


@needs_real_data
def test_two_hundred_real_rows_packed_to_1024_tokens_have_the_logits_of_each_row_alone():
    with REAL.open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(200)]
    texts = [f"{row['prompt']}\n\n{row['chosen']}" for row in rows]
    tokenizer = train_tokenizer(texts, 2048)
    documents = [np.array([*ids, tokenizer.eos_token_id], np.int32)[:512] for ids in tokenizer(texts).input_ids]
    bins = pack(np.array([len(document) for document in documents]), 1024)
    assert bins.fill > 0.95 and len(bins) < 100
    config = dataclasses.replace(
        tiny.LLAMA, vocab_size=2048, padded_vocab=2048, num_heads=2, num_kv_heads=1, max_positions=512
    )
    params, seen = tiny.random_params(config, single_device_mesh()), 0
    for start, stop in zip(bins.offsets, bins.offsets[1:], strict=False):
        inside = [documents[i] for i in bins.members[start:stop]]
        tokens, mask, segments = pack_documents(inside, [[len(document) for document in inside]], 1024)
        together = np.asarray(logits_of(config, params, tokens, mask, segments))[mask]
        for document in inside:
            apart = np.asarray(logits_of(config, params, *pad_documents([document], 512)))[0, : len(document)]
            np.testing.assert_allclose(together[: len(document)], apart, atol=1e-4)
            together, seen = together[len(document) :], seen + len(document)
        assert not len(together)
    assert seen == sum(map(len, documents))
