"""Files, numbers and paths that are wrong on purpose: one line each, at once, in little memory."""

import errno
import gzip
import io
import json
import os
import pathlib
import signal
import socket
import struct
import time
import tracemalloc
import types
import zipfile
import zlib
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_unlearn.app import cli, data, memory, sampling
from jax_unlearn.app.data import arrays
from jax_unlearn.app.memory import Memory, check_run
from jax_unlearn.app.options import (
    ConceptOptions,
    DataOptions,
    DemoOptions,
    SampleOptions,
)
from jax_unlearn.app.run_file import load_run, save_run
from jax_unlearn.app.tasks import concept_request
from jax_unlearn.app.terminal import printable, say
from jax_unlearn.pretrained import Pretrained, load_pretrained
from jax_unlearn.pretrained.subsets import lora_init

PLAIN = {"shape": (8, 8, 1)}
MB = 2**20


@pytest.fixture(autouse=True)
def _never_hangs():
    """Whoever opens a pipe waits for ever: a signal ends that."""

    def late(number, frame):
        raise AssertionError("it hangs")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def line_of(function, *given, **options):
    """What is said by a refusal, which is one line without control characters."""
    with pytest.raises(ValueError, match=".") as caught:
        function(*given, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def refused_at_once(source, **options):
    """The same of images, within a second and 4 MB."""
    tracemalloc.start()
    started = time.monotonic()
    message = line_of(data.read_images, str(source), **PLAIN, **options)
    taken, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 2, taken
    assert peak < 4 * MB, peak
    return message


# ------------------------------------------------------------------ bombs


def npy_header(shape, version=1, descr="|u1"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text


def deflated(head, zeros):
    """A raw deflate stream of a head and MBs of zeros: one flushed block, many times."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * (zeros // MB) + packer.flush()


def write_zip(path, packed, size, *, method=8, name=b"images.npy", claimed=None):
    """A zip of one member whose directory says what it is told to."""
    claimed = len(packed) if claimed is None else claimed
    common = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, 0, claimed, size, len(name), 0)
    local = b"PK\3\4" + common + name + packed
    central = b"PK\1\2" + struct.pack("<H", 20) + common + bytes(14) + name
    counts = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + b"PK\5\6" + counts)
    return path


THREE_GB = 3000 * MB
LARGE = npy_header((3000, 1024, 1024))
SMALL = npy_header((3, 8, 8))


@pytest.mark.parametrize(
    ("head", "zeros", "size", "words"),
    [
        # All agree on 3 GB in 3 MB.
        (LARGE, THREE_GB, len(LARGE) + THREE_GB, "compressed by more than 500"),
        # The data go on for 3 GB after what is declared.
        (SMALL, THREE_GB, len(SMALL) + 192, "CRC"),
        # The header alone says 3 GB, or the directory alone.
        (LARGE, MB, len(LARGE) + MB, "should have"),
        (SMALL, MB, THREE_GB, "should have"),
        # Both say so, and nothing is there.
        (LARGE, 0, len(LARGE) + THREE_GB, "CRC"),
        (npy_header((10**30, 8, 8)), MB, MB, "should have"),
        (npy_header((-3, -8, 8)), MB, len(npy_header((-3, -8, 8))) + 192, "not a readable"),
        # A header of 2 GB.
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b"(" * MB, THREE_GB, THREE_GB, "header"),
        (b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"[" * 9000, MB, MB, "not a readable"),
        (b"\x93NUMPY\3\0" + SMALL[8:], MB, MB, "version (3, 0)"),
        (npy_header((3, 8, 8), descr="|O"), MB, MB, "pickled"),
    ],
)
def test_an_npz_that_claims_or_hides_too_much(tmp_path, head, zeros, size, words):
    path = write_zip(tmp_path / "a.npz", deflated(head, zeros), size)
    message = refused_at_once(path)
    assert words in message
    assert str(path) in message


def test_an_npz_that_lies_about_how_much_is_compressed(tmp_path):
    packed = deflated(LARGE, MB)
    path = write_zip(tmp_path / "a.npz", packed, len(LARGE) + THREE_GB, claimed=2**31)
    message = refused_at_once(path)
    # Later releases of Python see by themselves that the entry reaches into what follows it.
    assert "compressed by more than 500" in message or "Overlapped entries" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_that_numpy_would_not_have_written(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", npy_header((3, 8, 8)) + bytes(192))
    assert "neither stored nor deflated" in refused_at_once(tmp_path / "a.npz")


def test_names_in_an_npz_do_not_act(tmp_path):
    np.savez(tmp_path / "a.npz", **{"\x1b[31m\nred": np.zeros(3)})
    assert r"\x1b[31m\nred" in refused_at_once(tmp_path / "a.npz")


def test_blank_images_are_read_however_well_they_are_compressed(tmp_path):
    images = np.zeros((100, 8, 8), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    write_gzip(tmp_path / "a-images-idx3-ubyte.gz", images.shape, images.size)
    for name in ("a.npz", "a-images-idx3-ubyte.gz"):
        read = data.read_images(str(tmp_path / name), **PLAIN)
        np.testing.assert_array_equal(read.pixels[..., 0], images)


def write_gzip(path, shape, zeros):
    head = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    if zeros < MB:
        path.write_bytes(gzip.compress(head + bytes(zeros)))
    else:
        path.write_bytes(gzip.compress(b"")[:10] + deflated(head, zeros) + bytes(8))
    return path


@pytest.mark.parametrize(
    ("shape", "zeros", "words"),
    [
        ((3000, 1024, 1024), THREE_GB, "compressed by more than 500"),
        ((3, 8, 8), THREE_GB, "at least"),
        ((3000, 1024, 1024), 100, "compressed by more than 500"),
        ((2**32 - 1,) * 3, MB, "compressed by more than 500"),
        ((0, 8, 8), THREE_GB, "damaged"),
    ],
)
def test_a_gzip_that_claims_or_hides_too_much(tmp_path, shape, zeros, words):
    path = write_gzip(tmp_path / "a-images-idx3-ubyte.gz", shape, zeros)
    assert words in refused_at_once(path)


def test_more_images_than_memory_has_names_for(tmp_path, monkeypatch):
    """A sparse file of a thousand million images of a pixel: their names alone take 150 GB."""
    monkeypatch.setattr(arrays, "machine_memory", lambda: 64 * 10**9)
    path, count = tmp_path / "a-images-idx3-ubyte", 10**9
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", count, 1, 1))
    os.truncate(path, 16 + count)
    message = refused_at_once(path)
    assert "1000000000 images" in message
    assert "32.0 GB" in message


def test_an_npz_larger_than_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=np.zeros((1000, 8, 8), np.uint8))
    monkeypatch.setattr(arrays, "machine_memory", lambda: 100_000)
    assert "half of this machine's memory" in refused_at_once(tmp_path / "a.npz")


def png(path, width, height):
    """A PNG that declares its size, and has no more than a few of its pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(99))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("size", [(30_000, 30_000), (2**26 + 1, 1), (8193, 8192)])
def test_an_image_of_too_many_pixels(tmp_path, monkeypatch, size, guarded):
    if not guarded:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = png(tmp_path / "a.png", *size)
    message = refused_at_once(path, resize=True)
    assert str(path) in message
    assert "pixels" in message


def test_a_folder_in_a_folder_in_a_folder(tmp_path):
    (tmp_path / "/".join("a" * 70)).mkdir(parents=True)
    assert "64 deep" in refused_at_once(tmp_path)


# ------------------------------------------------------------------ what is no file


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    here = os.open(path.parent, os.O_RDONLY)  # A socket's own path must be short.
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def make_link_to_nothing(path):
    path.symlink_to(path.with_name("gone"))


NO_FILES = {
    make_pipe: "is a pipe",
    make_device: "is a device",
    make_socket: "is a socket",
    make_link_to_nothing: "is a link to nothing",
}


@pytest.mark.parametrize(("make", "words"), NO_FILES.items())
@pytest.mark.parametrize("name", ["a.png", "a.npz", "a-images-idx3-ubyte", "x/b.png"])
def test_images_that_are_no_files(tmp_path, make, words, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    assert words in refused_at_once(path.parent if "/" in name else path)


@pytest.mark.parametrize(("make", "words"), NO_FILES.items())
def test_labels_that_are_no_file(tmp_path, make, words):
    write_gzip(tmp_path / "a-images-idx3-ubyte.gz", (3, 8, 8), 192)
    make(tmp_path / "a-labels-idx1-ubyte")
    assert words in refused_at_once(tmp_path / "a-images-idx3-ubyte.gz")


@pytest.mark.parametrize(
    ("make", "words"), [*NO_FILES.items(), (pathlib.Path.mkdir, "is a folder")]
)
def test_captions_prompts_and_configs_that_are_no_files(tmp_path, make, words):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    make(tmp_path / "a.txt")
    assert words in line_of(data.read_captions, [str(tmp_path / "a.png")])
    assert words in line_of(concept_request.prompt_lines, f"@{tmp_path / 'a.txt'}")
    assert words in line_of(load_run, tmp_path / "a.txt", "data", DataOptions)


def test_what_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8), np.uint8))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")

    def denied(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    # Modes of files do not stop the administrator, who may run this test.
    monkeypatch.setattr(pathlib.Path, "open", denied)
    for name in ("a.npz", "a.png"):
        message = line_of(data.read_images, str(tmp_path / name), **PLAIN)
        assert message == f"{tmp_path / name} cannot be read: Permission denied."
    for read in (
        lambda: data.read_captions([str(tmp_path / "a.png")]),
        lambda: concept_request.prompt_lines(f"@{tmp_path / 'a.txt'}"),
        lambda: load_run(tmp_path / "a.txt", "data", DataOptions),
    ):
        assert line_of(read) == f"{tmp_path / 'a.txt'} cannot be read: Permission denied."


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "a\0b", "a.png/b"])
def test_paths_that_no_file_can_have(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_text("")
    with pytest.raises(ValueError, match=r"cannot be read|does not exist|has no"):
        data.read_images(path, **PLAIN)


# ------------------------------------------------------------------ texts


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\0b", "a\x7fb", "a\x9bb", "\ud800"])
def test_control_characters_are_refused_in_texts(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (
        lambda: data.read_captions([str(tmp_path / "a.png")]),
        lambda: concept_request.prompt_lines(f"@{tmp_path / 'a.txt'}"),
        lambda: concept_request.prompt_lines(text),
        lambda: data.parse_source(f"images:{text}"),
        lambda: ConceptOptions(forget=("a", text)).validate(),
        lambda: ConceptOptions(forget=("a",), base=text).validate(),
        lambda: DemoOptions(forget=(text,)).validate(),
        lambda: SampleOptions(prompts=(text,)).validate(),
    ):
        message = line_of(read)
        assert "control character" in message or "no text in UTF-8" in message


def test_other_texts_are_kept(tmp_path):
    # A family of four, which needs its joiners, and a name that is written from right to left.
    text = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u05d0\u05d1 \xe9"
    (tmp_path / "a.txt").write_text(f"  {text}\t\n b ", encoding="utf-8")
    assert data.read_captions([str(tmp_path / "a.png")]) == [f"{text} b"]
    assert concept_request.prompt_lines(f"@{tmp_path / 'a.txt'}") == [text, "b"]
    assert data.parse_source(f"images:{text}").label == text


def test_texts_that_are_too_large(tmp_path):
    (tmp_path / "a.txt").write_text("")
    os.truncate(tmp_path / "a.txt", 10**12)
    tracemalloc.start()
    assert "at most 65536" in line_of(data.read_captions, [str(tmp_path / "a.png")])
    assert "at most 16777216" in line_of(concept_request.prompt_lines, f"@{tmp_path / 'a.txt'}")
    assert "at most" in line_of(load_run, tmp_path / "a.txt", "data", DataOptions)
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()


# ------------------------------------------------------------------ the terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\bc\x0bd", r"a\rb\x08c\x0bd"),
        ("\x7f\x85\x9b31m", r"\x7f\x85\x9b31m"),
        ("\u202egnp.exe \u2066\u2069\u200f\u061c", r"\u202egnp.exe \u2066\u2069\u200f\u061c"),
        ("a\u2028b\ud800\udcff", r"a\u2028b\ud800\udcff"),
        (
            "two\nlines\tof \xe9 \U0001f600 \u200d \u05d0",
            "two\nlines\tof \xe9 \U0001f600 \u200d \u05d0",
        ),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert printable(text) == shown


def test_every_character_of_category_control_is_shown_but_two():
    kept = {
        chr(code) for code in (*range(32), *range(127, 160)) if printable(chr(code)) == chr(code)
    }
    assert kept == {"\t", "\n"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_say_prints_what_the_terminal_cannot_write(encoding):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    say("\x1b \u20ac", file)
    assert (
        raw.getvalue()
        == b"\\x1b " + ("\u20ac".encode() if encoding == "utf-8" else b"\\u20ac") + b"\n"
    )


def test_say_goes_to_where_standard_error_is_now(capsys):
    say("a\x1bb")
    assert capsys.readouterr().err == "a\\x1bb\n"


# ------------------------------------------------------------------ memory


def pretrained_of(params, shape=(8, 8, 1), labels=3, text=False):
    config = types.SimpleNamespace(sample_shape=shape, num_labels=labels, text_conditional=text)
    return Pretrained(None, params, None, config)


TEN = {"kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32)}
NOTHING = {"batch_size": 1, "forget_batch_size": 1, "evaluation_images": 1, "samples": 0}


@pytest.mark.parametrize(
    ("kind", "changes", "flag", "size"),
    [
        # Noise and samples of three labels, 64 floats each.
        (DataOptions, {"samples": 1000}, "--samples 1000", 1000 * 3 * 2 * 4 * 64),
        # Held-out images, and halves of three sets, in bytes.
        (DataOptions, {"evaluation_images": 1000}, "--evaluation-images 1000", 160_000),
        (ConceptOptions, {"evaluation_images": 10**6}, "--evaluation-images", 16 * 10**6),
        # Two samples and their noise; three arrays more for each of ten steps.
        (
            ConceptOptions,
            {"formulation": "likelihood", "stored_samples": 100},
            "--stored-samples 100 with --target-steps 10",
            100 * 4 * 64 * (4 + 3 * 10),
        ),
        (
            ConceptOptions,
            {"method": "neg-grad", "stored_samples": 1000},
            "--stored-samples 1000",
            1000 * 4 * 64 * 4,
        ),
    ],
)
def test_what_fits_to_the_byte(kind, changes, flag, size):
    options = kind(**NOTHING | changes)
    # Ten parameters five times: reference, trained, gradient and two moments.
    needed = size + 4 * 10 * 5
    check_run(pretrained_of(TEN), options, Memory(needed))
    message = line_of(check_run, pretrained_of(TEN), options, Memory(needed - 1))
    assert flag in message
    assert message.count("GB") == 3
    # Arrays of the host take no memory of the accelerator, and parameters none of the host.
    check_run(pretrained_of(TEN), options, Memory(size, 10**5))
    assert flag in line_of(check_run, pretrained_of(TEN), options, Memory(size - 1, 10**5))


def test_batches_have_to_fit_on_the_device():
    options = DataOptions(**NOTHING | {"batch_size": 10**6})
    size = 10**6 * 2 * 4 * 64 // jax.device_count()
    check_run(pretrained_of(TEN), options, Memory(10**12, size + 200))
    message = line_of(check_run, pretrained_of(TEN), options, Memory(10**12, size + 199))
    assert "--batch-size 1000000 needs" in message
    assert "a device has" in message


KERNELS = {
    "attn2": {
        "to_k": {"kernel": np.zeros((6, 4)), "bias": np.zeros(4)},
        "to_q": {"kernel": np.zeros((4, 4))},
    },
    "conv": {"kernel": np.zeros((3, 3, 2, 8))},
}


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("full", 188),
        ("cross-attention", 44),
        ("cross-attention-kv", 28),
        ("lora:2", 36),
        ("lora:3:no-cross-attention", 78),
    ],
)
def test_parameters_that_train_are_counted(train, trained):
    part = train.split(":")[2] if train.count(":") == 2 else "cross-attention"
    if train.startswith("lora:"):
        lora = lora_init(KERNELS, jax.random.key(0), rank=int(train.split(":")[1]), part=part)
        assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == trained
    options = DataOptions(**NOTHING, train=train)
    model = pretrained_of(KERNELS, text=True, shape=(1, 1, 1))
    needed = 4 * (188 + 4 * trained) + 10  # The images to evaluate are ten bytes.
    check_run(model, options, Memory(needed))
    message = line_of(check_run, model, options, Memory(4 * (188 + 4 * trained) - 1))
    assert f"the model with --train {train} needs" in message


@pytest.mark.parametrize("name", ["batch_size", "evaluation_images", "samples", "stored_samples"])
def test_numbers_beyond_every_machine(name, tiny_model):
    model = load_pretrained(tiny_model)
    plain = {"formulation": "likelihood", "forget": ("cat",)}
    check_run(model, ConceptOptions(**plain))
    check_run(model, DataOptions())
    options = ConceptOptions(**plain, **{name: 10**12})
    assert f"--{name.replace('_', '-')} {10**12}" in line_of(check_run, model, options)


def test_a_machine_has_memory(tmp_path):
    found = memory.available()
    assert found.machine > 10**8
    assert found.device is None or found.device > 10**8


def test_the_command_line_asks_first(tiny_model, tiny_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 * 10**9)
    given = ["data", "--model", str(tiny_model), "--out", str(tmp_path / "out")]
    given += ["--forget", str(tiny_images["forget"]), "--retain", str(tiny_images["retain"])]
    assert cli.main([*given, "--evaluation-images", str(10**9)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--evaluation-images 1000000000 needs 160.0 GB" in message
    assert "this machine has 8.0 GB" in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ options


def write_run(path, command, **options):
    path.write_text(json.dumps({"command": command, "version": "0.2", "options": options}))
    return path


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("steps", True, "a whole number, not true"),
        ("steps", 1.5, "a whole number, not 1.5"),
        ("steps", "10", 'a whole number, not "10"'),
        ("steps", None, "a whole number, not null"),
        ("steps", [1], "a whole number, not [1]"),
        ("learning_rate", "1e-4", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", 10**400, "a number"),
        ("weighting", "foo", "'simple' or 'nelbo', not \"foo\""),
        ("weighting", ["simple"], "'simple' or 'nelbo'"),
        ("weighting", None, "'simple' or 'nelbo'"),
        ("forget", "x", "a list, each entry a text"),
        ("forget", ["x", 1], "a list, each entry a text"),
        ("forget", [["x"]], "a list, each entry a text"),
        ("forget", {"x": 1}, "a list, each entry a text"),
        ("model", None, "a text"),
        ("model", 3, "a text"),
        ("out", None, "a path"),
        ("out", ["a"], "a path"),
        ("judge", 3, "a path or null"),
        ("resize", 1, "true or false"),
        ("resize", "yes", "true or false"),
    ],
)
def test_options_of_another_type(tmp_path, name, value, takes):
    path = write_run(tmp_path / "run.json", "data", **{name: value})
    message = line_of(load_run, path, "data", DataOptions)
    assert message.startswith(f"{path}: --{name.replace('_', '-')} takes {takes}")


def test_a_number_may_be_whole(tmp_path):
    path = write_run(tmp_path / "run.json", "data", learning_rate=1, judge=None, guidance=2)
    options = load_run(path, "data", DataOptions)
    assert (options.learning_rate, options.judge, options.guidance) == (1.0, None, 2.0)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("data", DataOptions(forget=("a:1",), judge=pathlib.Path("b"), steps=7, weighting="nelbo")),
        ("concept", ConceptOptions(forget=("a",), base="b", start="reference", minibatches=5)),
        ("demo", DemoOptions(text=True, formulation="likelihood", threshold=("2x", "0.5"))),
    ],
)
def test_options_come_back(tmp_path, command, options):
    save_run(tmp_path / "run.json", command, options, identity={"options": {}}, legs=[])
    assert load_run(tmp_path / "run.json", command, type(options)) == options
    assert len(get_type_hints(type(options))) > 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "no readable json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "no readable json"),
        (b'{"command": "data", "options": ' + b'{"a":' * 99 + b"1" + b"}" * 100, "nested too deep"),
        (b'{"command": "data\xff"}', "no readable json"),
        (b"1" * 5000, "no readable json"),
        (b"", "no readable json"),
        (b"[]", "must hold a json object"),
        (b"{}", "not the run.json"),
        (b'{"command": "data"}', "not the run.json"),
        (b'{"command": "data", "options": []}', "not the run.json"),
        (b'{"command": ["data"], "options": {}}', "not the run.json"),
        (b'{"command": "\\u001b[31m", "options": {}}', r"\x1b[31m"),
        (b'{"command": "data", "options": {"\\u001b[31m": 1}}', r"\x1b[31m"),
    ],
)
def test_a_run_json_that_is_none(tmp_path, content, words):
    (tmp_path / "run.json").write_bytes(content)
    assert words in line_of(load_run, tmp_path / "run.json", "data", DataOptions)


@pytest.mark.parametrize(
    "given",
    [
        "data --guidance inf",
        "data --guidance nan",
        "data --guidance 1e39",
        "data --learning-rate inf",
        "data --learning-rate nan",
        "data --dual-learning-rate inf",
        "data --base-share nan",
        "data --seed 4294967296",
        f"data --seed {2**63}",
        f"data --seed {2**64}",
        "data --seed -1",
        "data --batch-size 10000000000",
        "data --evaluation-images 1000000000000",
        "data --samples 1000000000000",
        "data --steps 1000000000000",
        "data --checkpoint-every 1000000000000",
        "data --sampling-steps 1000000000000",
        "concept --stored-samples 1000000000000",
        "concept --chain-steps 1000000000000",
        "concept --target-steps 1000000000000",
        "concept --target-steps -1",
        "concept --corrections -1",
        "concept --corrections 1000000000000",
        "concept --minibatches 0",
        "concept --classifier-draws 1000000000000",
        "sample --guidance inf",
        "sample --guidance nan",
        "sample --guidance -1",
        "sample --seed -1",
        f"sample --seed {2**63}",
        "sample --samples 0",
        "sample --samples 1000000000000",
        "sample --steps 0",
        "sample --steps 1000000000000",
    ],
)
def test_numbers_are_refused_and_nothing_is_left(tmp_path, capsys, given):
    command, flag, value = given.split()
    more = {
        "data": ["--model", "m", "--forget", "a", "--retain", "b"],
        "concept": ["--forget", "Trouser"],
        "sample": [],
    }
    out = ["--out", str(tmp_path / "out")]
    assert cli.main([command, *more[command], *out, f"{flag}={value}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"jax-unlearn: {flag} must ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_numbers_at_their_limits_pass():
    SampleOptions(seed=2**32 - 1, samples=2**31 - 1, steps=2**31 - 1, guidance=3.4e38).validate()


@pytest.mark.parametrize("text", ["1e39", "1e400", "1e39x", "-0", "0", "nan", "infx", "1e-9999"])
def test_thresholds_that_no_loss_has(text):
    message = line_of(DemoOptions(threshold=(text,)).validate)
    assert message == f"threshold {text!r} must be positive and finite: losses are."


# ------------------------------------------------------------------ pictures


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def never(*given, **options):
        raise AssertionError("the model was loaded")

    for name in ("is_text_to_image", "load_pretrained", "load_text_to_image"):
        monkeypatch.setattr(sampling, name, never)


def sampled(capsys, out, *more):
    """The exit status of `sample` and the line that it prints."""
    status = cli.main(["sample", "--out", str(out), *more])
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return status, message


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (pathlib.Path.touch, "out/a.png", "Not a directory"),
        (pathlib.Path.touch, "out/a/b.png", "Not a directory"),
        (pathlib.Path.mkdir, "out", "is no file"),
        (make_pipe, "out", "is no file"),
        (make_device, "out", "is no file"),
        (make_link_to_nothing, "out", "link to nothing"),
        (pathlib.Path.mkdir, f"out/{'x' * 300}.png", "File name too long"),
        (pathlib.Path.mkdir, f"out/a/{'x' * 300}/b.png", "File name too long"),
        (pathlib.Path.mkdir, f"out/a/{'x' * 250}.png", "File name too long"),
        (pathlib.Path.mkdir, "out/" + "x/" * 3000, "File name too long"),
    ],
)
def test_pictures_that_cannot_be_written(unloaded, tmp_path, capsys, make, name, words, overwrite):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    status, message = sampled(capsys, tmp_path / name, *overwrite)
    assert status == 2
    assert words in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_in_a_folder_for_reading(unloaded, tmp_path, capsys, monkeypatch):
    def refused(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sampling.tempfile, "TemporaryFile", refused)
    status, message = sampled(capsys, tmp_path / "a.png")
    assert (status, message) == (
        2,
        f"jax-unlearn: cannot write {tmp_path / 'a.png'}: Read-only file system.\n",
    )


def test_a_picture_on_a_full_disk(unloaded, tmp_path, capsys, monkeypatch):
    # What is opened beside the picture is a device that is always full.
    monkeypatch.setattr(sampling.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb"))
    status, message = sampled(capsys, tmp_path / "a.png")
    assert status == 1
    assert "disk is full" in message


def test_a_disk_that_is_full_once_the_picture_is_drawn(tiny_model, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sampling, "replace_file", full)
    status, message = sampled(
        capsys, tmp_path / "a.png", "--model", str(tiny_model), "--samples=1", "--steps=1"
    )
    assert status == 1
    assert "disk is full" in message
    assert not list(tmp_path.iterdir())


def test_more_samples_than_memory(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 * 10**9)
    more = ["--model", str(tiny_model), "--samples", str(10**8)]
    status, message = sampled(capsys, tmp_path / "a.png", *more)
    assert status == 2
    assert "--samples 100000000 needs" in message
    assert not list(tmp_path.iterdir())


def test_more_steps_than_the_schedule_has(tiny_model, tmp_path, capsys):
    more = ["--model", str(tiny_model), "--steps", "51"]
    status, message = sampled(capsys, tmp_path / "a.png", *more)
    assert status == 2
    assert "50" in message
