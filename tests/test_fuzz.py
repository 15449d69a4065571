"""Files that users bring, damaged and invented: what reads them returns or refuses in a line.

A refusal is a ValueError of one line without control characters. Nothing else may be raised or
warned of, and no file may take seconds or gigabytes.

The examples here are the same every time. Others, and many more of them, are searched by hand:

    FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py -k tokenizer

Hypothesis then prints the smallest file that it found; that becomes an `@example` below.
"""

import contextlib
import copy
import datetime
import gzip
import io
import json
import os
import pathlib
import resource
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

from jax_unlearn import schedules
from jax_unlearn.app import data, embedded
from jax_unlearn.app.options import ConceptOptions, DataOptions
from jax_unlearn.app.report import read_rows
from jax_unlearn.app.run_file import load_run, save_run
from jax_unlearn.app.tasks import concept_request
from jax_unlearn.models.judge import load_judge
from jax_unlearn.pretrained import load_clip, load_pretrained
from jax_unlearn.pretrained.clip_tokenizer import load_tokenizer
from jax_unlearn.pretrained.digests import check_digests, write_digests
from jax_unlearn.pretrained.networks import load_network
from jax_unlearn.pretrained.text_to_image import is_text_to_image, load_text_to_image
from jax_unlearn.pretrained.weights import read_params

ASKED = os.environ.get("FUZZ_EXAMPLES")
FIXTURES = pathlib.Path(__file__).parent / "fixtures"
EMBEDDED = pathlib.Path(embedded.__file__).parent
MOST = 2**29  # Bytes that one example may add.

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="jax_unlearn-fuzz-"))


def fuzz(examples):
    """Settings of a test with so many examples, unless more are asked for."""
    return settings(
        max_examples=int(ASKED or examples),
        derandomize=not ASKED,
        database=None,
        deadline=datetime.timedelta(seconds=10),
        suppress_health_check=[*HealthCheck],
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if ASKED else [])],
    )


def most_held():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def holds(read, *given):
    """The property: `read` returns, or refuses in a line."""
    before, message = most_held(), "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read(*given)
        except ValueError as error:
            message = str(error)
    assert message
    assert message.isprintable(), repr(message)
    assert most_held() - before < MOST


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ------------------------------------------------------------------ what files may hold

EVIL = st.sampled_from(
    [
        None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e-320,
        1e308, float("inf"), -float("inf"), float("nan"), "", "a", "..", "../a", "/a", "a/b",
        "\x00", "\x1b[31m\n", "\u202e", "\ud800", "1", "null", [], {}, [[]], [None], [0], ["a"],
        {"a": 1}, {"": None}, [1] * 50, [8, 16], ["DownBlock2D", "UpBlock2D"], [["diffusers"]],
    ]
)  # fmt: skip
JSON = st.recursive(
    EVIL | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(content, path=()):
    """The paths of all entries of a json document."""
    entries = ()
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, list):
        entries = enumerate(content)
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(content, edits):
    """A document with entries replaced, removed or added; see `documents`."""
    content = copy.deepcopy(content)
    for place, kind, value in edits:
        found = list(places(content))
        if not found:
            break
        *above, last = found[place % len(found)]
        holder, value = content, copy.deepcopy(value)
        for key in above:
            holder = holder[key]
        if kind == "remove":
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[f"{last}_"] = value
        elif kind == "again" and isinstance(holder, list):
            holder += [value, *holder]
        elif kind == "near" and type(holder[last]) in (int, float):
            holder[last] = holder[last] * 2 + 1
        else:
            holder[last] = value
    return content


EDITS = st.lists(
    st.tuples(
        st.integers(0, 500),
        st.sampled_from(["put", "put", "remove", "add", "again", "near"]),
        EVIL | JSON,
    ),
    min_size=1,
    max_size=3,
)


def changed(content, edits):
    """Bytes with flips, cuts, repetitions and insertions."""
    content = bytearray(content)
    for kind, start, size, put in edits:
        start %= len(content) + 1
        if kind == "flip" and start < len(content):
            content[start] ^= 1 << size % 8
        elif kind == "cut":
            del content[start : start + size]
        elif kind == "end":
            del content[start:]
        elif kind == "repeat":
            content[start:start] = content[start : start + size]
        elif kind == "put":
            content[start : start + len(put)] = put
        elif kind == "insert":
            content[start:start] = put
    return bytes(content)


# Lengths and counts stand at the beginning of most files, and of archives at the end.
STARTS = st.integers(0, 80) | st.integers(0, 2**16) | st.integers(-80, -1)
NUMBERS = st.sampled_from(
    [b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 3, b"\0\0\0\x80", b"\x1b[31m\n"]
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "end", "repeat", "put", "insert"]),
        STARTS,
        st.integers(0, 64),
        NUMBERS | st.binary(max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def dumped(content):
    # A half of a surrogate pair is escaped, as json can write it.
    return json.dumps(content).encode()


# ------------------------------------------------------------------ options and rows


@pytest.fixture(scope="module")
def run_json(folder):
    save_run(folder / "run.json", "concept", ConceptOptions(forget=("a", "b"), base="c"))
    return json.loads((folder / "run.json").read_text()) | {"legs": [{"after": 0}]}


@pytest.mark.slow
@fuzz(200)
@given(edits=EDITS)
@example(edits=[(2, "put", 10**400)])
def test_run_json(folder, run_json, edits):
    path = folder / "run.json"
    path.write_bytes(dumped(edited(run_json, edits)))

    def read():
        load_run(path, "concept", ConceptOptions).validate()

    holds(read)


@fuzz(100)
@given(content=st.binary(max_size=60) | JSON.map(dumped), edits=CHANGES)
@example(content=b"[" * 100_000, edits=[])
@example(content=b'{"command": "data", "options": {"steps": ' + b"1" * 5000 + b"}}", edits=[])
@example(content=b'{"command": "data", "options": {"a\\ud800": 1}}', edits=[])
def test_run_json_of_anything(folder, content, edits):
    (folder / "run.json").write_bytes(changed(content, edits))
    holds(load_run, folder / "run.json", "data", DataOptions)


ROWS = b'{"step": 1, "objective": 0.5, "values": [1.0, null]}\n{"step": 2, "objective": NaN}\n'


@fuzz(150)
@given(
    content=st.just(ROWS) | st.lists(JSON.map(dumped), max_size=3).map(b"\n".join), edits=CHANGES
)
@example(content=b"[" * 100_000 + b"\n", edits=[])
@example(content=b"1" * 5000 + b"\n", edits=[])
@example(content=b'{"a": "\x1b"}\n', edits=[])
def test_metrics(folder, content, edits):
    (folder / "metrics.jsonl").write_bytes(changed(content, edits))
    holds(read_rows, folder / "metrics.jsonl")


# ------------------------------------------------------------------ images and texts

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)


def archived(write, **arrays):
    file = io.BytesIO()
    write(file, **arrays)
    return file.getvalue()


def encoded(kind):
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, kind)
    return file.getvalue()


def read_images(path):
    data.read_images(str(path), shape=(8, 8, 1), num_labels=3, resize=True)


ARCHIVES = {"images": PIXELS, "labels": np.arange(3)}
NPZ = (archived(np.savez, **ARCHIVES), archived(np.savez_compressed, **ARCHIVES))


@fuzz(300)
@given(content=st.sampled_from(NPZ), edits=CHANGES)
def test_npz(folder, content, edits):
    (folder / "a.npz").write_bytes(changed(content, edits))
    holds(read_images, folder / "a.npz")


DESCRS = st.sampled_from(
    ["'|u1'", "'<f4'", "'|O'", "'|V0'", "'|S0'", "'<U2000000000'", "[('\x1b', '<u4')]", "'<c8'",
     "'<M8'", "'<f16'", "0", "None", "'\\d'", "u1", "[]", "{}", "('<u1', (2, 2))"]
)  # fmt: skip
SHAPES = st.sampled_from(
    ["(3, 8, 8)", "()", "(3,)", "(-3, -8, 8)", "(True, 8, 8)", "(0, 8, 8)", "(9**99, 0, 8)",
     "(1000000000000000000000000000, 8, 0)", "3", "(3, 8, 8, 1)", "(1e3, 8, 8)", "None",
     "(1,) * 99", "(" + "1, " * 99 + ")", "(-1, 192)", "(1, 1, 192)"]
)  # fmt: skip


@fuzz(300)
@given(
    texts=st.tuples(
        st.just("'|u1'") | DESCRS,
        st.just("False") | st.sampled_from(["True", "None", "2"]),
        st.just("(3, 8, 8)") | SHAPES,
    ),
    more=st.just("") | st.text(max_size=6),
    version=st.just(1) | st.sampled_from([2, 3, 9]),
    name=st.sampled_from(["images", "labels"]),
    content=st.sampled_from([bytes(192), b"", bytes(3), bytes(12), b"\xff" * 768]),
)
def test_npy_headers(folder, texts, more, version, name, content):
    header = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format(*texts) + more + "\n"
    text = header.encode("utf-8", "surrogatepass")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        if name == "labels":
            archive.writestr("images.npy", archived(np.save, arr=PIXELS))
        member = b"\x93NUMPY" + bytes((version, 0)) + length + text + content
        archive.writestr(f"{name}.npy", member)
    holds(read_images, folder / "a.npz")


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


@fuzz(300)
@given(
    images=st.just(idx(PIXELS)) | st.binary(max_size=30),
    labels=st.just(idx(np.arange(3, dtype=np.uint8))) | st.binary(max_size=12),
    edits=CHANGES,
    more=CHANGES,
    packed=st.booleans(),
)
def test_idx(folder, images, labels, edits, more, packed):
    end = ".gz" if packed else ""
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        content = changed(content, edits)
        path = folder / f"a-{name}-ubyte{end}"
        path.write_bytes(changed(gzip.compress(content, mtime=0), more) if packed else content)
    holds(read_images, folder / f"a-images-idx3-ubyte{end}")


IMAGES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}


@fuzz(300)
@given(kind=st.sampled_from(sorted(IMAGES)), edits=CHANGES)
def test_images(folder, kind, edits):
    path = folder / "images" / "0" / "a.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(changed(IMAGES[kind], edits))
    holds(read_images, folder / "images")


@fuzz(100)
@given(content=st.binary(max_size=30) | st.text(max_size=30).map(lambda text: dumped(text)[1:-1]))
def test_texts(folder, content):
    path = folder / "a.txt"
    path.write_bytes(content)
    holds(data.read_captions, [str(path.with_suffix(".png"))])
    holds(concept_request.prompt_lines, f"@{path}")


@fuzz(100)
@given(text=st.text(max_size=30))
def test_sources(text):
    # Its path is the user's own, and is repeated as it is.
    with contextlib.suppress(ValueError):
        source = data.parse_source(text)
        if not os.path.exists(source.path):
            data.read_images(source, shape=(8, 8, 1), num_labels=3)


# ------------------------------------------------------------------ models


def copied(source, target, change):
    """A model's folder in which one file is what `change` makes of it."""
    name, content = change
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    (target / "model.sha256").unlink(missing_ok=True)
    (target / name).unlink()
    (target / name).write_bytes(content)
    return target


CONFIGS = {
    "unet": (FIXTURES / "unet_2d" / "no_mid_block", load_pretrained),
    "labels": (FIXTURES / "unet_2d" / "class_timestep", load_pretrained),
    "conditional": (FIXTURES / "stable_diffusion" / "unet" / "tiny", load_network),
    "encoder": (FIXTURES / "stable_diffusion" / "text_encoder", load_network),
    "autoencoder": (FIXTURES / "stable_diffusion" / "vae", load_network),
    "clip": (EMBEDDED / "clip", load_clip),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@fuzz(40)
@given(edits=EDITS)
def test_configs(folder, name, edits):
    source, load = CONFIGS[name]
    config = json.loads((source / "config.json").read_text())
    path = copied(source, folder / name, ("config.json", dumped(edited(config, edits))))
    holds(load, path)


SCHEDULER = json.loads(
    (EMBEDDED / "text_model" / "scheduler" / "scheduler_config.json").read_text()
)


@fuzz(150)
@given(edits=EDITS)
def test_schedulers(edits):
    holds(schedules.from_diffusers, edited(SCHEDULER, edits))


INDEX = json.loads((EMBEDDED / "text_model" / "model_index.json").read_text())


@pytest.mark.slow
@fuzz(15)
@given(edits=EDITS)
def test_model_indices(folder, edits):
    content = dumped(edited(INDEX, edits))
    path = copied(EMBEDDED / "text_model", folder / "pipeline", ("model_index.json", content))
    holds(is_text_to_image, path)
    holds(load_text_to_image, path)
    holds(load_pretrained, path)


TOKENIZER = EMBEDDED / "text_model" / "tokenizer"
VOCABULARY = {
    "vocab.json": dumped(
        {"a</w>": 0, "b": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4, "b</w>": 5}
        | {"a": 6}
    ),
    "merges.txt": b"#version: 0.2\na b</w>\n",
    "tokenizer_config.json": dumped(
        {
            "model_max_length": 77,
            "pad_token": {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"},
            "added_tokens_decoder": {"3": {"content": "<|startoftext|>"}},
            "additional_special_tokens": ["<|endoftext|>"],
        }
    ),
}


@fuzz(150)
@given(name=st.sampled_from(sorted(VOCABULARY)), edits=CHANGES, entries=EDITS, raw=st.booleans())
def test_tokenizers_of_two_files(folder, name, edits, entries, raw):
    path = folder / "vocabulary"
    path.mkdir(exist_ok=True)
    for each, content in VOCABULARY.items():
        if each == name and (raw or not name.endswith(".json")):
            content = changed(content, edits)
        elif each == name:
            content = dumped(edited(json.loads(content), entries))
        (path / each).write_bytes(content)
    holds(use_tokenizer, path)


@fuzz(60)
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), edits=EDITS)
def test_tokenizers_of_one_file(folder, name, edits):
    content = json.loads((TOKENIZER / name).read_text())
    path = copied(TOKENIZER, folder / "tokenizer", (name, dumped(edited(content, edits))))
    holds(use_tokenizer, path)


def use_tokenizer(path):
    load_tokenizer(path)(["a ab", ""])


ENCODER = FIXTURES / "stable_diffusion" / "text_encoder"
TENSORS = {
    "b": {name: jax.ShapeDtypeStruct((2, 2), np.float32) for name in ("scale", "bias")},
}
TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.slow
@fuzz(80)
@given(edits=CHANGES)
def test_safetensors(folder, edits):
    weights = changed((ENCODER / "model.safetensors").read_bytes(), edits)
    path = copied(ENCODER, folder / "weights", ("model.safetensors", weights))
    holds(load_network, path)


@fuzz(200)
@given(
    edits=st.just([]) | EDITS,
    second=st.just("b.bias") | st.text(max_size=6),
    offsets=st.just([16, 32]) | st.lists(st.integers(-1, 2**65), min_size=2, max_size=2),
    length=st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
    size=st.sampled_from([32, 32, 32, 0, 16, 33]),
)
def test_safetensors_headers(folder, edits, second, offsets, length, size):
    tensors = {"b.weight": TENSOR, second: TENSOR | {"data_offsets": offsets}}
    content = dumped(edited({"__metadata__": {"format": "pt"}} | tensors, edits))
    length = struct.pack("<Q", len(content) if length is None else length)
    path = folder / "a.safetensors"
    path.write_bytes(length + content + bytes(size))
    holds(read_params, TENSORS, [path])


JUDGE = json.loads((EMBEDDED / "judge.json").read_text())


@fuzz(60)
@given(edits=EDITS)
def test_judges(folder, edits):
    path = folder / "judge.safetensors"
    if not path.exists():
        os.link(EMBEDDED / "judge.safetensors", path)
    path.with_suffix(".json").write_bytes(dumped(edited(JUDGE, edits)))
    holds(load_judge, path)


@fuzz(100)
@given(edits=CHANGES)
@example(edits=[("insert", 0, 0, b"../a")])
def test_lists_of_digests(folder, edits):
    path = folder / "digests"
    if not path.exists():
        shutil.copytree(TOKENIZER, path)
        write_digests(path)
        shutil.copy(path / "model.sha256", folder / "model.sha256")
    (path / "model.sha256").write_bytes(changed((folder / "model.sha256").read_bytes(), edits))
    holds(check_digests, path)
