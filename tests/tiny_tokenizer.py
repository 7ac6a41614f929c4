"""Small byte-level BPE tokenizers, trained in milliseconds, in the style of real families."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Human: What is the capital of France?\n\nAssistant: The capital of France is Paris. Anything else?",
    "Human: Please add 3 and 4.\n\nAssistant: Sure! 3 + 4 = 7. Have a nice day!",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def gpt2_like(**options) -> PreTrainedTokenizerFast:
    """A tokenizer without a BOS; <s> is 0, </s> is 1, <|im_start|> is 2, <|im_end|> is 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    options = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": control[2:], **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def opt_like(**options) -> PreTrainedTokenizerFast:
    """A tokenizer that adds </s> before a text, which is both BOS and EOS."""
    tokenizer = gpt2_like(bos_token="</s>", **options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def chatml_like(**options) -> PreTrainedTokenizerFast:
    """A tokenizer with its own chat template, whose end of turn <|im_end|> is not the EOS </s>."""
    return gpt2_like(chat_template=CHATML, **options)


def llama_like(**options) -> PreTrainedTokenizerFast:
    """SentencePiece BPE as in Llama 2: no word boundaries, blanks as "▁", unknown characters as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # Trained on words, so that no piece runs across a blank; used on whole texts.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*control, *pieces], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    # The bytes are pieces of the model, not added tokens, which would match in the text.
    state = json.loads(backend.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    )
