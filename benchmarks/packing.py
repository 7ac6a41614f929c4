"""The padding of SFT rows with one document per row and with several packed into a row.

    python -m benchmarks.packing FILE [--length 512] [--vocab-size 8192]

FILE is JSON lines with the fields prompt and chosen. A BPE tokenizer is trained on the chosen answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.provenance import record
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.packing import pack
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.stages.from_scratch import train_tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer (default: %(default)s)")
    args = parser.parse_args(argv)
    with args.file.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]
    tokenizer = prepare_tokenizer(train_tokenizer(texts, args.vocab_size))
    data = DataConfig((SourceConfig(str(args.file)),), split={"sft": 1.0}, held_out=0.0, max_length=args.length)
    lengths = select_rows(data, tokenizer, RowSpec("demonstration", "sft"), held_out=False).parts[0].lengths[:, 0]
    bins = pack(lengths, args.length)
    record(
        "packing",
        {
            "file": args.file.parent.name,
            "length": args.length,
            "documents": len(lengths),
            "padding": 1 - float(lengths.mean()) / args.length,
            "packed_rows": len(bins),
            "packed_padding": 1 - bins.fill,
        },
    )


if __name__ == "__main__":
    main()
