"""CLIP's tokenizer: prompts to the integers that a text encoder takes."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from jax_unlearn.models.config import is_count, is_number
from jax_unlearn.models.files import MAX_BYTES, check_file, read_json, shown
from jax_unlearn.pretrained.digests import check_digests
from jax_unlearn.pretrained.hub import check_folder

__all__ = ["CLIPTokenizer", "load_tokenizer", "read_tokenizer"]

# Special tokens, contractions, words, single digits, and runs of anything else but spaces.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Of the released models. Of a text encoder none has had more than 248 positions.
_LENGTH, _MAX_LENGTH = 77, 2**16
# What transformers writes for a tokenizer without a length of its own is 1e30.
_NO_LENGTH = 1e20
# Tokens are int32.
_MAX_TOKEN = 2**31 - 1


class CLIPTokenizer(NamedTuple):
    """A byte-level BPE of lower-cased text between a start and an end token, padded.

    Attributes:
      bpe: of the text alone.
      start: token before the text.
      end: token after it.
      pad: token that fills the rest; the end token in Stable Diffusion 1.x, 0 in 2.x.
      length: tokens of a padded prompt.
    """

    bpe: tokenizers.Tokenizer
    start: int
    end: int
    pad: int
    length: int

    def __call__(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Tokenizes prompts.

        Args:
          prompts: one, or several.

        Returns:
          [B, length] int32.

        Raises:
          ValueError: if a prompt is too long; nothing is cut off.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            ids = [self.start, *self.bpe.encode(prompt, add_special_tokens=False).ids, self.end]
            if len(ids) > self.length:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens with start and end, of which the text encoder "
                    f"takes {self.length}: shorten {prompt!r}."
                )
            row[: len(ids)] = ids
        return tokens


def load_tokenizer(folder: str | os.PathLike[str]) -> CLIPTokenizer:
    """Reads a `tokenizer` folder of Stable Diffusion.

    The text is normalised and split as by transformers' `CLIPTokenizer`. As there, a special
    token in a prompt is itself, the pad token too: with the "!" of Stable Diffusion 2.x an
    exclamation mark is token 0.

    Args:
      folder: of `vocab.json` and `merges.txt`, or else `tokenizer.json`, beside
        `tokenizer_config.json` and `special_tokens_map.json` where there are.

    Returns:
      The tokenizer. Without a length of its own it has 77 tokens, as the released models do.

    Raises:
      ValueError: if there is no such tokenizer, if it is malformed, if it has tokens beside its
        vocabulary, or as `check_folder` and `check_digests`.
    """
    folder = pathlib.Path(folder)
    check_folder(folder)
    check_digests(folder)
    return read_tokenizer(folder)


def read_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    """As `load_tokenizer`, from a folder that was checked."""
    options: dict[str, Any] = _DEFAULTS | _read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in options:
        # Then this file wins in transformers: only it has the pad token of 2.x right.
        options |= _read_if_there(folder / "special_tokens_map.json")
    length = options.get("model_max_length", _LENGTH)
    if is_number(length) and length >= _NO_LENGTH:
        length = _LENGTH
    if not is_count(length, least=2) or length > _MAX_LENGTH:
        raise ValueError(
            f"{folder} has a malformed model_max_length: {shown(repr(length))}. Expected 2 to "
            f"{_MAX_LENGTH}."
        )
    added = {name: _added_token(options[name], f"the {name} of {folder}") for name in _DEFAULTS}
    bpe = _read_bpe(folder, added["unk_token"].content)
    vocabulary = bpe.get_vocab(with_added_tokens=False)
    if max(vocabulary.values(), default=0) > _MAX_TOKEN:
        raise ValueError(f"the vocabulary in {folder} is malformed: expected tokens in int32.")
    for name, kind in (("added_tokens_decoder", dict), ("additional_special_tokens", list)):
        if not isinstance(options.get(name) or kind(), kind):
            raise ValueError(f"{name} of {folder} is malformed: {shown(repr(options[name]))}.")
    listed = [
        *(options.get("added_tokens_decoder") or {}).values(),
        *(options.get("additional_special_tokens") or []),
        *_read_if_there(folder / "added_tokens.json"),
    ]
    tokens = [
        *added.values(),
        *(_added_token(token, f"an added token of {folder}") for token in listed),
    ]
    known = bpe.get_added_tokens_decoder().values()  # Those of tokenizer.json, which go first.
    for token in (*tokens, *known):
        if token.content not in vocabulary:
            raise ValueError(
                f"{folder} names a token {shown(repr(token.content))} beside its vocabulary: the "
                "text encoder has no embedding of it."
            )
    contents = {token.content for token in known}
    bpe.add_special_tokens([token for token in tokens if token.content not in contents])
    ids = {name: vocabulary[token.content] for name, token in added.items()}
    return CLIPTokenizer(bpe, ids["bos_token"], ids["eos_token"], ids["pad_token"], length)


def _read_if_there(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_bpe(folder: pathlib.Path, unknown: str) -> tokenizers.Tokenizer:
    paths = [folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json")]
    vocab, merges, whole = (str(path) for path in paths)
    for path in paths:
        if path.exists():
            check_file(path, MAX_BYTES)
    try:
        if paths[0].is_file() and paths[1].is_file():
            bpe = tokenizers.Tokenizer(
                tokenizers.models.BPE.from_file(
                    vocab, merges, unk_token=unknown, end_of_word_suffix="</w>"
                )
            )
        elif paths[2].is_file():
            bpe = tokenizers.Tokenizer.from_file(whole)
        else:
            raise ValueError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json.")
    except ValueError:
        raise
    except Exception as error:  # The wheel raises nothing more special.
        reason = shown(str(error))
        raise ValueError(f"the tokenizer in {folder} is malformed: {reason}") from error
    if not isinstance(bpe.model, tokenizers.models.BPE) or bpe.model.end_of_word_suffix != "</w>":
        raise ValueError(f"the tokenizer in {folder} is not CLIP's byte-pair encoding.")
    bpe.no_padding()
    bpe.no_truncation()
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return bpe


def _added_token(value: Any, where: str) -> tokenizers.AddedToken:
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    try:
        if isinstance(value, str):
            return tokenizers.AddedToken(value, special=True, normalized=False)
        if isinstance(value, Mapping) and isinstance(value.get("content"), str):
            options = {name: bool(value[name]) for name in flags if name in value}
            return tokenizers.AddedToken(value["content"], special=True, **options)
    except UnicodeError:  # Half of a character, which json can hold.
        pass
    raise ValueError(f"{where} is malformed: {shown(repr(value))}.")
