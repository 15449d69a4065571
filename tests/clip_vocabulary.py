"""A small vocabulary of CLIP's tokenizer, and its folder."""

import json

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "d o", "do g</w>"]
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# One symbol a byte: those that print are themselves, the others follow from U+0100 on.
BYTES = [chr(byte) for byte in PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(PRINTABLE))]
WORDS = [*BYTES, *(byte + "</w>" for byte in BYTES), *(pair.replace(" ", "") for pair in MERGES)]
VOCABULARY = {word: i for i, word in enumerate([*WORDS, START, END])}


def added(content, normalized=True):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}
    return {"content": content} | flags


def write_tokenizer(folder, pad=END, **options):
    """A folder as that of Stable Diffusion 1.x, or with the pad token "!" of 2.x."""
    special = {"bos_token": added(START), "eos_token": added(END), "unk_token": added(END)}
    special["pad_token"] = pad
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    # The pad token of 2.x is wrong in the second file, unless that lists what is added.
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": END}
    if "added_tokens_decoder" in options:
        config |= {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    else:
        config |= {
            name: {"__type": "AddedToken"} | special[name]
            for name in ("bos_token", "eos_token", "unk_token")
        }
    config |= options
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
