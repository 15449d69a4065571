import numpy as np
import pytest
from clip_vocabulary import END, START, VOCABULARY, added, write_tokenizer

from jax_unlearn.pretrained.clip_tokenizer import load_tokenizer

PROMPTS = [
    "The CAT and  the\tdog!",
    "hello! wow!! it's 42",
    f"a {END} b{START} {END.upper()} c",
    "CAFÉ e\u0301 ñ 日本 🎉",
    "x \n\u3000 y",
    "",
]


def ids(*words):
    return [VOCABULARY[word] for word in words]


def test_text_is_lower_cased_and_padded(tmp_path):
    tokens = load_tokenizer(write_tokenizer(tmp_path))(["The  CAT\n's", "", "dog 42"])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == np.int32
    rows = [
        [START, "the</w>", "cat</w>", "'", "s</w>", END],
        [START, END],
        [START, "dog</w>", "4</w>", "2</w>", END],
    ]
    for row, words in zip(tokens, rows, strict=True):
        np.testing.assert_array_equal(row, ids(*words) + ids(END) * (77 - len(words)))


def test_letters_beyond_ascii_are_bytes(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    # é is c3 a9 in UTF-8, both of which print as themselves in Latin-1.
    composed = ids(START, "ca", "f", "\xc3", "\xa9</w>", END)
    np.testing.assert_array_equal(tokenizer("CAFÉ")[0, :6], composed)
    np.testing.assert_array_equal(tokenizer("cafe\u0301"), tokenizer("CAFÉ"))


def test_exclamation_mark_as_pad_token(tmp_path):
    tokens = load_tokenizer(write_tokenizer(tmp_path, pad="!"))("cat!")
    expected = ids(START, "cat</w>", "!", END) + [0] * 73
    np.testing.assert_array_equal(tokens, [expected])
    decoder = {"0": added("!", normalized=False)}
    tokens = load_tokenizer(write_tokenizer(tmp_path, pad="!", added_tokens_decoder=decoder))(
        "cat!"
    )
    np.testing.assert_array_equal(tokens, [expected])
    tokens = load_tokenizer(write_tokenizer(tmp_path))("cat!")
    np.testing.assert_array_equal(tokens[0, 1:4], ids("cat</w>", "!</w>", END))


def test_long_prompts_are_reported_and_not_cut(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    np.testing.assert_array_equal(tokenizer("cat " * 75)[0, 1:76], ids("cat</w>") * 75)
    with pytest.raises(ValueError, match="78 tokens with start and end, .* takes 77: shorten 'cat"):
        tokenizer(["", "cat " * 76])
    assert load_tokenizer(write_tokenizer(tmp_path, model_max_length=9))("").shape == (1, 9)
    # What transformers writes for a tokenizer without a length of its own.
    none = load_tokenizer(write_tokenizer(tmp_path, model_max_length=int(1e30)))
    assert none("").shape == (1, 77)


def test_malformed_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither vocab.json and merges.txt nor tokenizer.json"):
        load_tokenizer(tmp_path)
    for options, message in [
        ({"model_max_length": 10**9}, "malformed model_max_length: 1000000000. Expected 2 to"),
        ({"model_max_length": 1}, "malformed model_max_length: 1"),
        ({"pad": "<pad>"}, "names a token '<pad>' beside its vocabulary"),
        ({"pad": None}, "the pad_token of .* is malformed: None"),
        ({"additional_special_tokens": ["<holiday>"]}, "token '<holiday>' beside"),
        ({"added_tokens_decoder": {"520": added("<holiday>")}}, "token '<holiday>' beside"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(write_tokenizer(tmp_path, **options))
    write_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<holiday>": 520}')
    with pytest.raises(ValueError, match="token '<holiday>' beside"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc zebra\n")
    with pytest.raises(ValueError, match="is malformed: "):
        load_tokenizer(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("style", ["old", "decoder", "whole"])
def test_equals_transformers(tmp_path, pad, style):
    transformers = pytest.importorskip("transformers")
    options = {}
    if style == "decoder":
        special = {pad: added(pad, False), START: added(START), END: added(END, pad == "!")}
        options["added_tokens_decoder"] = {
            str(VOCABULARY[content]): token | {"special": True}
            for content, token in special.items()
        }
    folder = write_tokenizer(tmp_path, pad, **options)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
    if style == "whole":
        folder = tmp_path / "saved"
        theirs.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    np.testing.assert_array_equal(load_tokenizer(folder)(PROMPTS), expected)
