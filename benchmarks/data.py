"""One million dialogues through `data/`: the speed and memory of tokenisation, the time until a second run
starts, and the rate of batches compared with what a model consumes.

    python -m benchmarks.data [--rows 1000000] [--folder runs/data]

Everything is generated: the text (about 1 KB per dialogue, words by Zipf's law) and a byte-level BPE of 16,000 tokens
trained on a part of it. Each part runs in its own process, so that its memory is measured separately.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.provenance import record

WORDS_PER_ROW = (40, 130)  # means of the prompt and the answer
VOCABULARY = 60_000
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/data"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.folder)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make_rows(args.folder / "dialogues.jsonl", args.rows)
    found = {}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.data", "--part", part, "--folder", str(args.folder)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found |= json.loads(output.splitlines()[-1])
        print(part, json.loads(output.splitlines()[-1]), flush=True)
    found |= {
        "share_of_tokenizers": found["rows_per_second"] / found["tokenizers_rows_per_second"],
        "served_over_consumed": found["served_rows_per_second"] / found["consumed_rows_per_second"],
    }
    print(json.dumps(found, indent=2))
    record("data", found)


def make_rows(path: Path, count: int) -> None:
    """Dialogues as JSON lines with prompt and answer, unless the file exists."""
    if path.exists():
        return
    rng = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = sorted({"".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(VOCABULARY)})
    rng.shuffle(words)
    chances = 1 / np.arange(1, len(words) + 1)
    chances /= chances.sum()
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            here = min(10_000, count - start)
            lengths = rng.poisson(np.array(WORDS_PER_ROW)[:, None] * rng.lognormal(-0.125, 0.5, here)) + 1
            drawn = iter(rng.choice(len(words), int(lengths.sum()), p=chances).tolist())
            for prompt, answer in lengths.T.tolist():
                asked = " ".join(words[next(drawn)] for _ in range(prompt))
                said = " ".join(words[next(drawn)] for _ in range(answer))
                file.write(json.dumps({"prompt": asked + "?", "answer": said + "."}) + "\n")


def tokenizer_in(folder: Path):
    from transformers import AutoTokenizer

    from rlhf_jax.data.chat_template import prepare_tokenizer
    from rlhf_jax.stages.from_scratch import train_tokenizer

    if not (folder / "tokenizer").exists():
        with open(folder / "dialogues.jsonl", encoding="utf-8") as file:
            rows = [json.loads(next(file)) for _ in range(20_000)]
        texts = [" Human:", " Assistant:", *(text for row in rows for text in row.values())]
        train_tokenizer(texts, 16_000).save_pretrained(folder / "tokenizer")
    return prepare_tokenizer(AutoTokenizer.from_pretrained(folder / "tokenizer"))


def rows_in(folder: Path, tokenizer):
    from rlhf_jax.data.config import DataConfig, SourceConfig
    from rlhf_jax.data.records import RowSpec
    from rlhf_jax.data.selection import select_rows

    source = SourceConfig(str(folder / "dialogues.jsonl"), answer="answer", chosen="", rejected="")
    config = DataConfig((source,), split={"sft": 1.0}, held_out=0.0, cache_dir=str(folder / "cache"))
    return select_rows(config, tokenizer, RowSpec("demonstration", "sft"), held_out=False)


def tokenizers_alone(folder: Path) -> dict[str, float]:
    """Tokenizes the texts of a tenth of the rows with the tokenizers library alone, in batches of 1024."""
    tokenizer = tokenizer_in(folder)
    size = (folder / "dialogues.jsonl").stat().st_size
    with open(folder / "dialogues.jsonl", encoding="utf-8") as file:
        count = sum(1 for _ in file)
        file.seek(0)
        rows = [json.loads(next(file)) for _ in range(max(count // 10, min(count, 1024)))]
    texts = [f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['answer']}</s>" for row in rows]
    backend, start = tokenizer.backend_tokenizer, time.perf_counter()
    for at in range(0, len(texts), 1024):
        backend.encode_batch(texts[at : at + 1024], add_special_tokens=False)
    seconds = time.perf_counter() - start
    return {
        "rows": count,
        "text_bytes": size,
        "tokenizers_rows_per_second": len(texts) / seconds,
    }


def first_run(folder: Path) -> dict[str, float]:
    """Everything from the file to the rows, with an empty cache."""
    import shutil

    shutil.rmtree(folder / "cache", ignore_errors=True)
    tokenizer = tokenizer_in(folder)
    with Memory() as memory:
        start = time.perf_counter()
        rows = rows_in(folder, tokenizer)
        seconds = time.perf_counter() - start
    tokens = sum(int(part.lengths.sum()) for part in rows.parts)
    return {
        "rows_per_second": rows.parts[0].stats.rows / seconds,
        "tokens": tokens,
        "build_seconds": seconds,
        "build_rss_bytes": memory.most,
        "build_rss_growth_after_a_fifth": memory.growth,
        "store_bytes": sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()),
    }


def second_run(folder: Path) -> dict[str, float]:
    """Imports and the tokenizer, then the first batch, then batches of 64 through one whole epoch."""
    begun = time.perf_counter()
    from rlhf_jax.data.batches import Batches, Prefetch

    tokenizer = tokenizer_in(folder)
    imported = time.perf_counter()
    rows = rows_in(folder, tokenizer)
    batches = Batches(rows, batch_size=64, seed=0)
    prefetch = Prefetch(batches, batches.steps_per_epoch)
    prefetch[0]
    first = time.perf_counter()
    with Memory() as memory:
        steps = batches.steps_per_epoch
        start = time.perf_counter()
        for step in range(1, steps):
            prefetch[step]
        seconds = time.perf_counter() - start
    return {
        "imports_seconds": imported - begun,
        "first_batch_seconds": first - imported,
        "served_rows_per_second": 64 * (steps - 1) / seconds,
        "serving_rss_bytes": memory.most,
        "serving_rss_growth_after_a_fifth": memory.growth,
    }


def consumption(folder: Path) -> dict[str, float]:
    """SFT of the demo's model on these rows: the time of a step of 64 rows on this machine."""
    import dataclasses

    import jax

    from rlhf_jax.config import load_config
    from rlhf_jax.data.batches import Batches
    from rlhf_jax.mesh import make_mesh
    from rlhf_jax.models.decoder import init_params
    from rlhf_jax.models.families import decoder_config
    from rlhf_jax.models.pretrained import Pretrained
    from rlhf_jax.optim import make_optimizer
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.stages.from_scratch import make_hf_config
    from rlhf_jax.stages.models import make_state
    from rlhf_jax.stages.sft import sft_objective
    from rlhf_jax.stages.supervised import make_programs

    recipe = load_config(Path(__file__).parent.parent / "configs" / "demo.toml", [], Recipe)
    tokenizer = tokenizer_in(folder)
    rows = rows_in(folder, tokenizer)
    batches = Batches(rows, batch_size=recipe.sft.batch_size, seed=0)
    new = dataclasses.replace(recipe.model.new, max_positions=batches.lengths[-1])
    hf = make_hf_config(new, recipe.model.new.vocab_size)  # the demo's model has the demo's vocabulary
    layout = recipe.layout(make_mesh(recipe.mesh))
    decoder = decoder_config(hf, scalar_head=False)
    params = init_params(decoder, jax.random.key(0), layout)
    tx = make_optimizer(recipe.sft.optim, 100)
    state, frozen = make_state(Pretrained(decoder, params, tokenizer, hf, {}, layout), recipe.model, tx, 0)
    adapted = recipe.model.with_lora(decoder)
    update, _ = make_programs(sft_objective(adapted, recipe.model.compute, layout), adapted, layout, tx, 1)
    seconds = []
    for step in range(4):
        batch = batches[step]
        batch = dataclasses.replace(batch, tokens=batch.tokens % decoder.vocab_size)
        start = time.perf_counter()
        state, stats = update(state, frozen, layout.put_batch(batch))
        float(stats["loss"])
        seconds.append(time.perf_counter() - start)
    return {"consumed_rows_per_second": recipe.sft.batch_size / min(seconds[1:])}


PARTS = {
    "tokenizers": tokenizers_alone,
    "first": first_run,
    "second": second_run,
    "consumption": consumption,
}


class Memory:
    """Resident memory while the body runs, in bytes: the peak, and the growth after a fifth of the samples."""

    def __enter__(self) -> Memory:
        self._samples: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self._samples.append(resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        samples = [*self._samples, resident()]
        self.most = max(samples)
        self.growth = self.most - max(samples[: len(samples) // 5 + 1])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
