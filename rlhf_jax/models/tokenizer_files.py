"""Files of tokenizers: read as tokenizer.json says, and written so that transformers 4 and 5 both read them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates"),
)
_IDS = ("model", "normalizer", "pre_tokenizer", "decoder")  # the parts of tokenizer.json that ids and texts depend on
LOGGER = logging.getLogger(__name__)
_SIDES = ("padding_side", "truncation_side")


def open_tokenizer(path_or_id: str | Path) -> Any:
    """The transformers tokenizer of a folder or hub id, with the ids of its tokenizer.json where it has one.

    For some families `AutoTokenizer` ignores the class that tokenizer_config.json names, and builds the pipeline of its
    own class (Qwen2's words, for instance) around the vocabulary of tokenizer.json.

    Raises:
        ValueError: there is only a SentencePiece model, and sentencepiece is not installed.
    """
    from tokenizers import Tokenizer  # imported where used: with transformers it takes seconds
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    _check_sentencepiece(Path(path_or_id))
    tokenizer = AutoTokenizer.from_pretrained(path_or_id)
    path = cached_file(path_or_id, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return _with_own_tokens(tokenizer, path_or_id)
    backend = Tokenizer.from_file(path)
    if hasattr(tokenizer, "backend_tokenizer") and _same(_parts(tokenizer.backend_tokenizer), _parts(backend)):
        return tokenizer
    name = type(tokenizer).__name__
    LOGGER.info(f"{path_or_id}: read by its tokenizer.json, from which transformers' {name} differs")
    named = {
        key: token for key, token in tokenizer.special_tokens_map.items() if backend.token_to_id(token) is not None
    }
    return PreTrainedTokenizerFast.from_pretrained(path_or_id, **named)


def _with_own_tokens(tokenizer: Any, path_or_id: str | Path) -> Any:
    """The tokenizer with the special tokens that config.json names, where the folder has no more than a vocabulary.

    DeepSpeed-Chat writes such folders. There transformers adds the special tokens that its class has by default, with
    new ids, and leaves out the BOS that OPT's texts begin with.
    """
    from transformers.utils import cached_file

    names = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    *given, config = (cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False) for name in names)
    if any(given) or config is None or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    hf = json.loads(Path(config).read_text())
    words = {str(i): word for word, i in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).items()}
    named = {key: words.get(str(hf.get(f"{key}_id"))) for key in ("bos_token", "eos_token", "pad_token")}
    if tokenizer.eos_token in words.values() or named["eos_token"] is None:
        return tokenizer
    LOGGER.info(f"{path_or_id} has no tokenizer_config.json: the special tokens are those that its config.json names")
    named |= {"unk_token": named["eos_token"], "add_bos_token": hf.get("model_type") == "opt"}
    return type(tokenizer).from_pretrained(path_or_id, **named)


def _check_sentencepiece(folder: Path) -> None:
    """ValueError where a folder's tokenizer needs sentencepiece; transformers would ask for tiktoken."""
    path = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not path.exists():
        return
    with path.open("rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # a protocol buffer that begins with a piece; tiktoken's is text
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        if is_sentencepiece:
            raise ValueError(
                f"{folder} has only tokenizer.model, of SentencePiece, and no tokenizer.json: pip install sentencepiece"
            ) from error


def write_tokenizer(tokenizer: Any, folder: Path, source: Path | None) -> None:
    """The files of the tokenizer, for transformers 4 and 5.

    Args:
        tokenizer: None writes nothing.
        source: the folder that it came from, or None. Its files are copied bit for bit, except for changed special
            tokens, a changed chat template and what transformers 4 does not read. Where ids have changed, or without
            `source`, the files are those of transformers.
    """
    if tokenizer is None:
        return
    files = [] if source is None else [source / name for name in _FILES if (source / name).exists()]
    is_named = any("tokenizer" in path.name for path in files)  # a vocabulary alone has no names of special tokens
    before = open_tokenizer(source) if is_named and source is not None else None
    if before is None or not _has_same_ids(before, tokenizer):
        tokenizer.save_pretrained(folder)
        _edit_json(folder / "tokenizer_config.json", {})
        return
    for path in files:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)
    old, new = before.special_tokens_map, tokenizer.special_tokens_map
    changed = {key: new.get(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if changed and (folder / "special_tokens_map.json").exists():
        _edit_json(folder / "special_tokens_map.json", changed)
    changed |= {key: getattr(tokenizer, key) for key in _SIDES if getattr(before, key) != getattr(tokenizer, key)}
    _edit_json(folder / "tokenizer_config.json", changed)
    if before.chat_template != tokenizer.chat_template:
        _write_templates(folder, tokenizer.chat_template)


def _parts(backend: Any) -> dict[str, Any]:
    return json.loads(backend.to_str())


def _same(one: dict[str, Any], other: dict[str, Any], *more: str) -> bool:
    return all(_without_defaults(one[part]) == _without_defaults(other[part]) for part in (*_IDS, *more))


def _without_defaults(part: Any) -> Any:
    """A part without absent options (null, false or empty) and without offsets, which change no id."""
    if isinstance(part, list):
        return [_without_defaults(each) for each in part] if part and isinstance(part[0], dict) else part
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if value not in (None, False, "") and key != "trim_offsets"}
    return {key: _without_defaults(value) for key, value in kept.items()}


def _has_same_ids(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to every text; their padding and named tokens may differ."""
    if any(getattr(tokenizer, "backend_tokenizer", None) is None for tokenizer in (one, other)):
        return one.get_vocab() == other.get_vocab()
    parts = (_parts(tokenizer.backend_tokenizer) for tokenizer in (one, other))
    return _same(*parts, "post_processor", "added_tokens")


def _edit_json(path: Path, changed: dict[str, Any]) -> None:
    """Change these keys, None removes one, and those that transformers 4 cannot read; nothing to change: no write."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {key: value for key, value in (before | changed).items() if key not in changed or value is not None}
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        extra = content.pop("extra_special_tokens")
        content["additional_special_tokens"] = content.get("additional_special_tokens") or extra
    if content != before:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_templates(folder: Path, templates: str | dict[str, str] | None) -> None:
    """Replace the default chat template, or those of a dict by their names, and keep other named ones.

    A template of tokenizer_config.json is replaced there too: of both, some programs read only the one.
    """
    if not isinstance(templates, dict):
        templates = {} if templates is None else {"default": templates}
    config = folder / "tokenizer_config.json"
    inside = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
    if isinstance(inside, list):
        named = {each["name"]: each["template"] for each in inside} | templates
        _edit_json(config, {"chat_template": [{"name": key, "template": text} for key, text in named.items()]})
        return
    if inside is not None:
        _edit_json(config, {"chat_template": templates.get("default")})
        templates = {name: text for name, text in templates.items() if name != "default"}
    for name, text in templates.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
