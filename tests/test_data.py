import gzip
import os
import re
import struct
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jax_unlearn.app import data
from jax_unlearn.app.data import Images, Source, batches

NAMES = {0: "T-shirt/top", 1: "Trouser", 2: "Ankle boot", 3: "7"}
MODEL = {"shape": (4, 4, 1), "num_labels": 3, "id2label": {i: NAMES[i] for i in range(3)}}
PLAIN = {"shape": (4, 4, 1)}
COLOUR = {"shape": (4, 4, 3)}


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def images_of(pixels, labels=None):
    labels = None if labels is None else np.asarray(labels, np.int32)
    return Images(pixels, labels, tuple(f"x[{i}]" for i in range(len(pixels))))


def refuses(source, *words, **options):
    with pytest.raises(ValueError, match=".") as caught:
        data.read_images(source, **options)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, message
    assert "\n" not in message


# ------------------------------------------------------------------ sources


def test_parse_source_without_a_label(tmp_path):
    assert data.parse_source("images") == Source(Path("images"), None)
    assert data.parse_source(r"C:\images") == Source(Path(r"C:\images"), None)
    assert data.parse_source("C:/images") == Source(Path("C:/images"), None)


def test_parse_source_with_a_label(tmp_path):
    assert data.parse_source("images:3") == Source(Path("images"), "3")
    assert data.parse_source(r"C:\images:3") == Source(Path(r"C:\images"), "3")
    assert data.parse_source("images:T-shirt/top") == Source(Path("images"), "T-shirt/top")


def test_parse_source_prefers_the_longest_existing_path(tmp_path):
    (tmp_path / "a:1").mkdir()
    assert data.parse_source(f"{tmp_path}/a:1") == Source(tmp_path / "a:1", None)
    assert data.parse_source(f"{tmp_path}/a:1:2") == Source(tmp_path / "a:1", "2")
    (tmp_path / "b").mkdir()
    assert data.parse_source(f"{tmp_path}/b:x:y") == Source(tmp_path / "b", "x:y")


@pytest.mark.parametrize("text", ["", " ", ":3", "images:"])
def test_parse_source_refuses(text):
    with pytest.raises(ValueError, match="PATH:LABEL"):
        data.parse_source(text)


# ------------------------------------------------------------------ folders and image files


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "gif", "tif", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_files_come_back_exactly(tmp_path, suffix, channels):
    pixels = random_pixels(4, 4, channels)
    path = save(tmp_path / f"a.{suffix}", pixels[..., 0] if channels == 1 else pixels)
    read = data.read_images(str(path), shape=(4, 4, channels))
    np.testing.assert_array_equal(read.pixels, pixels[None])
    assert read.pixels.dtype == np.uint8
    assert read.labels is None
    assert read.names == (str(path),)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_files_are_what_pillow_decodes(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", random_pixels(4, 4, 3))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(data.read_images(str(path), **COLOUR).pixels[0], expected)


def test_gif_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(random_pixels(4, 4, seed=i)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read = data.read_images(str(tmp_path / "a.gif"), **PLAIN)
    np.testing.assert_array_equal(read.pixels[0, ..., 0], np.asarray(frames[0]))


def test_palette_and_bilevel_images_are_exact(tmp_path):
    bits = random_pixels(4, 4) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    read = data.read_images(str(tmp_path / "bits.png"), **PLAIN)
    np.testing.assert_array_equal(read.pixels[0, ..., 0], bits * np.uint8(255))
    palette = Image.fromarray(random_pixels(4, 4) % 8)
    colours = random_pixels(8, 3, seed=1)
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "palette.png")
    read = data.read_images(str(tmp_path / "palette.png"), **COLOUR)
    np.testing.assert_array_equal(read.pixels[0], colours[random_pixels(4, 4) % 8])
    refuses(str(tmp_path / "palette.png"), "palette.png", "--resize", **PLAIN)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = random_pixels(6, 4)
    save(tmp_path / "a.png", pixels, exif=exif)
    read = data.read_images(str(tmp_path / "a.png"), shape=(4, 6, 1))
    np.testing.assert_array_equal(read.pixels[0, ..., 0], np.rot90(pixels, -1))


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    pixels = random_pixels(4, 4, 4)
    for name, image in zip(["b.png", "a/z.png", "a/b/c.png", "c.png"], pixels, strict=True):
        save(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_text("hidden")
    save(tmp_path / ".cache" / "d.png", pixels[0])
    read = data.read_images(str(tmp_path), **PLAIN)
    assert read.names == tuple(
        str(tmp_path / n) for n in ("a/b/c.png", "a/z.png", "b.png", "c.png")
    )
    np.testing.assert_array_equal(read.pixels[..., 0], pixels[[2, 1, 0, 3]])


def test_linked_folders_are_read_once(tmp_path):
    save(tmp_path / "far" / "a.png", random_pixels(4, 4))
    (tmp_path / "near").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "near" / "link")
    assert len(data.read_images(str(tmp_path / "near"), **PLAIN).names) == 1
    os.symlink(tmp_path / "near", tmp_path / "far" / "loop")
    refuses(str(tmp_path / "near"), "twice", "link", **PLAIN)


@pytest.mark.parametrize(
    "folders",
    [("0", "1", "2"), ("T-shirt_top", "TROUSER", "ankle-boot"), ("t-shirt-top", "1", "Ankle_Boot")],
)
def test_folder_names_are_labels(tmp_path, folders):
    for folder in folders:
        save(tmp_path / folder / "deep" / "a.png", random_pixels(4, 4))
        save(tmp_path / folder / "b.png", random_pixels(4, 4))
    read = data.read_images(str(tmp_path), **MODEL)
    found = {Path(n).relative_to(tmp_path).parts[0]: i for n, i in zip(read.names, read.labels)}  # noqa: B905
    assert found == {folder: i for i, folder in enumerate(folders)}
    assert read.labels.dtype == np.int32
    selected = data.read_images(f"{tmp_path}:trouser", **MODEL)
    assert selected.labels.tolist() == [1, 1]
    assert all(Path(n).relative_to(tmp_path).parts[0] == folders[1] for n in selected.names)


def test_explicit_label_is_given_to_a_source_without_labels(tmp_path):
    save(tmp_path / "2024" / "a.png", random_pixels(4, 4))
    save(tmp_path / "b.png", random_pixels(4, 4))
    assert data.read_images(f"{tmp_path}:2", **MODEL).labels.tolist() == [2, 2]
    assert data.read_images(f"{tmp_path}/b.png:t-shirt/TOP", **MODEL).labels.tolist() == [0]
    source = Source(tmp_path / "b.png", "Ankle boot")
    assert data.read_images(source, **MODEL).labels.tolist() == [2]


def test_numbered_folders_are_only_folders_for_a_model_without_labels(tmp_path):
    save(tmp_path / "12" / "a.png", random_pixels(4, 4))
    assert data.read_images(str(tmp_path), **PLAIN).labels is None


def test_16_bit_images_are_exact_or_refused(tmp_path):
    pixels = random_pixels(4, 4)
    for suffix in ("png", "tiff"):
        save(tmp_path / f"exact.{suffix}", pixels.astype(np.uint16) * 257)
        read = data.read_images(str(tmp_path / f"exact.{suffix}"), **PLAIN)
        np.testing.assert_array_equal(read.pixels[0, ..., 0], pixels)
        path = save(tmp_path / f"deep.{suffix}", pixels.astype(np.uint16) * 256 + 1)
        for resize in (False, True):
            refuses(str(path), path.name, "16 bits", "8 bits", resize=resize, **PLAIN)


def test_16_bit_colour_that_pillow_would_truncate_is_refused(tmp_path):
    import zlib

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + random_pixels(4 * 6, seed=i).tobytes() for i in range(4))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    refuses(str(tmp_path / "a.png"), "a.png", "16 bits", **COLOUR)


def test_32_bit_images_are_refused(tmp_path):
    path = save(tmp_path / "a.tiff", random_pixels(4, 4).astype(np.float32))
    refuses(str(path), "a.tiff", "mode F", resize=True, **PLAIN)


def test_many_pages_are_refused(tmp_path):
    pages = [Image.fromarray(random_pixels(4, 4, seed=i)) for i in range(2)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    refuses(str(tmp_path / "a.tiff"), "a.tiff", "2 frames", **PLAIN)


def test_absent_path(tmp_path):
    refuses(f"{tmp_path}/gone:3", f"{tmp_path}/gone", "does not exist", **PLAIN)


def test_folder_without_images(tmp_path):
    refuses(str(tmp_path), "no images", "no files", ".png", **PLAIN)
    for name in ("a.txt", "b.txt", "c.NPZ", "README"):
        (tmp_path / name).write_text("")
    refuses(str(tmp_path), ".txt (2)", ".npz (1)", "no suffix (1)", **PLAIN)


def test_other_kinds_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("")
    refuses(f"{tmp_path}/a.txt", "a.txt", ".npz", "idx3", **PLAIN)


def test_wrong_sizes_and_channels_name_the_file(tmp_path):
    save(tmp_path / "a.png", random_pixels(4, 4))
    save(tmp_path / "b.png", random_pixels(5, 4))
    refuses(str(tmp_path), "b.png", "5 x 4 L", "4 x 4 L", "--resize", **PLAIN)
    refuses(f"{tmp_path}/a.png", "a.png", "4 x 4 L", "RGB", "--resize", **COLOUR)
    save(tmp_path / "c.png", random_pixels(4, 4, 3))
    refuses(f"{tmp_path}/c.png", "4 x 4 RGB", "--resize", **PLAIN)
    refuses(f"{tmp_path}/c.png", "5 channels", "npz", shape=(4, 4, 5), resize=True)


def test_transparency_is_refused_or_flattened_on_white(tmp_path):
    pixels = random_pixels(4, 4, 4)
    pixels[:2, :, 3], pixels[2:, :, 3] = 255, 0
    path = save(tmp_path / "a.png", pixels)
    refuses(str(path), "RGBA", "transparency", "--resize", **COLOUR)
    read = data.read_images(str(path), resize=True, **COLOUR).pixels[0]
    np.testing.assert_array_equal(read[:2], pixels[:2, :, :3])
    assert (read[2:] == 255).all()
    grey = save(tmp_path / "grey.png", random_pixels(4, 4), transparency=3)
    refuses(str(grey), "transparency", "--resize", **PLAIN)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_damaged_images_are_named(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", random_pixels(64, 64, 3))
    content = path.read_bytes()
    shape = (64, 64, 3)
    for damaged in (content[: len(content) // 2], content[:12], b"", b"text" * 9):
        path.write_bytes(damaged)
        refuses(str(path), path.name, "cannot be decoded", shape=shape)


def test_warnings_of_the_decoder_are_refusals_even_where_they_are_ignored(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", random_pixels(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 pixels: Pillow only warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(str(path), "a.png", "decompression bomb", shape=(20, 20, 1))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        refuses(str(path), "a.png", "decompression bomb", shape=(20, 20, 1))


def test_the_content_does_not_choose_another_decoder(tmp_path):
    Image.fromarray(random_pixels(4, 4)).save(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").rename(tmp_path / "a.png")
    refuses(f"{tmp_path}/a.png", "cannot be decoded", **PLAIN)


# ------------------------------------------------------------------ resizing


def test_resize_crops_to_the_centre(tmp_path):
    pixels = random_pixels(4, 10)
    path = save(tmp_path / "a.png", pixels)
    read = data.read_images(str(path), resize=True, **PLAIN)
    np.testing.assert_array_equal(read.pixels[0, ..., 0], pixels[:, 3:7])


def test_resize_resamples_and_converts(tmp_path):
    path = save(tmp_path / "a.png", np.full((9, 8), 77, np.uint8))
    read = data.read_images(str(path), resize=True, **COLOUR)
    np.testing.assert_array_equal(read.pixels, np.full((1, 4, 4, 3), 77))
    colour = np.broadcast_to(np.array([10, 20, 30], np.uint8), (8, 8, 3))
    path = save(tmp_path / "b.jpg", np.ascontiguousarray(colour), quality=100, subsampling=0)
    grey = data.read_images(str(path), resize=True, **PLAIN).pixels
    np.testing.assert_allclose(grey, 0.299 * 10 + 0.587 * 20 + 0.114 * 30, atol=2)
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "c.jpg")
    refuses(f"{tmp_path}/c.jpg", "CMYK", "--resize", **COLOUR)
    assert data.read_images(f"{tmp_path}/c.jpg", resize=True, **COLOUR).pixels.max() < 5


def test_resize_leaves_what_fits_alone(tmp_path):
    path = save(tmp_path / "a.png", random_pixels(4, 4))
    for source in (path, save_npz(tmp_path / "a.npz", images=random_pixels(2, 4, 4))):
        plain = data.read_images(str(source), **PLAIN).pixels
        np.testing.assert_array_equal(
            data.read_images(str(source), resize=True, **PLAIN).pixels, plain
        )


@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (4,)])
def test_resize_of_arrays_is_that_of_the_files(tmp_path, channels):
    pixels = random_pixels(2, 6, 8, *channels)
    save_npz(tmp_path / "a.npz", images=pixels)
    read = data.read_images(f"{tmp_path}/a.npz", resize=True, **COLOUR).pixels
    squeezed = pixels[..., 0] if channels == (1,) else pixels
    for i in range(2):
        path = save(tmp_path / f"{i}.png", squeezed[i])
        expected = data.read_images(str(path), resize=True, **COLOUR).pixels[0]
        np.testing.assert_array_equal(read[i], expected)


# ------------------------------------------------------------------ npz


def test_npz_round_trip(tmp_path):
    pixels = random_pixels(3, 4, 4)
    path = save_npz(tmp_path / "a.npz", images=pixels, labels=np.array([2, 0, 2]))
    read = data.read_images(str(path), **MODEL)
    np.testing.assert_array_equal(read.pixels[..., 0], pixels)
    assert read.labels.tolist() == [2, 0, 2]
    assert read.labels.dtype == np.int32
    selected = data.read_images(f"{path}:2", **MODEL)
    np.testing.assert_array_equal(selected.pixels[..., 0], pixels[[0, 2]])
    assert selected.labels.tolist() == [2, 2]
    assert selected.names == (f"{path}[0]", f"{path}[2]")


def test_npz_without_labels_takes_an_explicit_one(tmp_path):
    path = save_npz(tmp_path / "a.npz", images=random_pixels(2, 4, 4, 1))
    assert data.read_images(f"{path}:1", **MODEL).labels.tolist() == [1, 1]


def test_npz_channels_are_not_limited_to_those_of_files(tmp_path):
    pixels = random_pixels(2, 4, 4, 5)
    path = save_npz(tmp_path / "a.npz", images=pixels)
    np.testing.assert_array_equal(data.read_images(str(path), shape=(4, 4, 5)).pixels, pixels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_unit_range_round_trip(tmp_path, dtype):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    path = save_npz(tmp_path / "a.npz", images=(pixels / 127.5 - 1).astype(dtype))
    np.testing.assert_array_equal(data.read_images(str(path), shape=(16, 16, 1)).pixels, pixels)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.linspace(0, 1, 32).reshape(2, 4, 4), ("0 to 1", "ambiguous", "[-1, 1]")),
        (np.linspace(0, 255, 32).reshape(2, 4, 4), ("0 to 255", "uint8")),
        (np.linspace(-2, 1, 32).reshape(2, 4, 4), ("-2 to 1", "[-1, 1]")),
        (np.full((2, 4, 4), np.nan), ("nan", "[-1, 1]")),
        (np.zeros((2, 4, 4), np.int64), ("int64", "uint8")),
        (np.zeros((4, 4), np.uint8), ("(4, 4)", "[n, height, width]")),
        (np.zeros((0, 4, 4), np.uint8), ("(0, 4, 4)",)),
        (np.zeros((2, 5, 4), np.uint8), ("a.npz[0]", "5 x 4 L", "4 x 4 L", "--resize")),
        (np.zeros((2, 1, 4, 4), np.uint8), ("a.npz[0]", "1 x 4 RGBA", "height x width")),
        (np.array([{}, {}]), ("pickled", "never loaded")),
    ],
)
def test_npz_images_that_are_refused(tmp_path, images, words):
    refuses(str(save_npz(tmp_path / "a.npz", images=images)), "a.npz", *words, **PLAIN)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0, 12]), ("label 12", "a.npz[1]", "has 3, 0..2: T-shirt/top, Trouser")),
        (np.array([-1, 0]), ("label -1", "a.npz[0]")),
        (np.array([0, 1, 2]), ("(3,)", "2 images")),
        (np.array([0.0, 1.0]), ("float64", "integers")),
        (np.array([[0], [1]]), ("(2, 1)", "integers")),
        (np.array([{}, {}]), ("pickled", "never loaded")),
    ],
)
def test_npz_labels_that_are_refused(tmp_path, labels, words):
    path = save_npz(tmp_path / "a.npz", images=random_pixels(2, 4, 4), labels=labels)
    refuses(str(path), *words, **MODEL)


def test_npz_without_images(tmp_path):
    path = save_npz(tmp_path / "a.npz", pictures=random_pixels(2, 4, 4))
    refuses(str(path), "`images`", "pictures", **PLAIN)


def test_damaged_npz(tmp_path):
    path = save_npz(tmp_path / "a.npz", images=random_pixels(9, 4, 4))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 255
    np.save(tmp_path / "array.npy", random_pixels(2, 4, 4))
    for damaged in (
        bytes(flipped),
        content[: len(content) // 2],
        b"",
        b"text",
        (tmp_path / "array.npy").read_bytes(),
    ):
        path.write_bytes(damaged)
        refuses(str(path), "a.npz", "not a readable", **PLAIN)


# ------------------------------------------------------------------ idx


@pytest.mark.parametrize("images_end", ["", ".gz"])
@pytest.mark.parametrize("labels_end", ["", ".gz"])
def test_idx_round_trip(tmp_path, images_end, labels_end):
    pixels = random_pixels(5, 4, 4)
    labels = np.array([0, 1, 2, 1, 0], np.uint8)
    path = save_idx(tmp_path / f"train-images-idx3-ubyte{images_end}", pixels)
    refuses(str(path), "labels are missing", "train-labels-idx1-ubyte", "PATH:LABEL", **MODEL)
    assert data.read_images(f"{path}:2", **MODEL).labels.tolist() == [2] * 5
    save_idx(tmp_path / f"train-labels-idx1-ubyte{labels_end}", labels)
    read = data.read_images(str(path), **MODEL)
    np.testing.assert_array_equal(read.pixels[..., 0], pixels)
    np.testing.assert_array_equal(read.labels, labels)
    selected = data.read_images(f"{path}:Trouser", **MODEL)
    np.testing.assert_array_equal(selected.pixels[..., 0], pixels[[1, 3]])
    assert selected.names == (f"{path}[1]", f"{path}[3]")


def test_labels_of_a_file_select_for_a_model_without_labels(tmp_path):
    path = save_idx(tmp_path / "train-images-idx3-ubyte", random_pixels(3, 4, 4))
    save_idx(tmp_path / "train-labels-idx1-ubyte", np.array([5, 7, 5], np.uint8))
    read = data.read_images(f"{path}:5", **PLAIN)
    assert read.labels is None
    assert read.names == (f"{path}[0]", f"{path}[2]")
    refuses(f"{path}:9", "selects nothing", "5, 7", **PLAIN)


def test_damaged_idx(tmp_path):
    path = save_idx(tmp_path / "train-images-idx3-ubyte", random_pixels(3, 4, 4))
    content = path.read_bytes()
    for damaged, word in (
        (content[:-1], "47 follow"),
        (content + b"x", "49 follow"),
        (b"\0\0\x08\x03\0\0\0\0" + content[8:], "damaged"),
        (b"\0\0\x0d\x03" + content[4:], "00000d03"),
        (content[:9], "not a readable"),
        (b"", "idx magic 00000803"),
    ):
        path.write_bytes(damaged)
        refuses(str(path), path.name, word, **PLAIN)
    labels = save_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    refuses(str(labels), "labels", "00000801", "00000803", **PLAIN)
    path.write_bytes(content)
    refuses(str(path), "2 labels for 3 images", **MODEL)


def test_damaged_gzip(tmp_path):
    path = save_idx(tmp_path / "train-images-idx3-ubyte.gz", random_pixels(30, 4, 4))
    content = path.read_bytes()
    for damaged in (content[:-20], content[:100], b"text" * 9, content[:-8] + bytes(8)):
        path.write_bytes(damaged)
        refuses(str(path), path.name, "not a readable idx", **PLAIN)


def test_resize_of_idx(tmp_path):
    path = save_idx(tmp_path / "train-images-idx3-ubyte", np.full((2, 3, 3), 9, np.uint8))
    refuses(str(path), "3 x 3 L", "4 x 4 RGB", "--resize", **COLOUR)
    read = data.read_images(str(path), resize=True, **COLOUR)
    np.testing.assert_array_equal(read.pixels, np.full((2, 4, 4, 3), 9))


# ------------------------------------------------------------------ labels


def test_labels_outside_the_model(tmp_path):
    path = save(tmp_path / "7" / "a.png", random_pixels(4, 4))
    refuses(f"{path}:12", "label '12'", "has 3, 0..2: T-shirt/top, Trouser, Ankle boot", **MODEL)
    refuses(f"{path}:Coat", "'Coat'", "unknown", "T-shirt/top", **MODEL)
    refuses(str(tmp_path), "sub-folders 7", "has 3", **MODEL)
    refuses(f"{path}:Coat", "has 2, 0..1.", shape=(4, 4, 1), num_labels=2)
    beyond = {2: "Coat"}
    refuses(f"{path}:Coat", "has 2", shape=(4, 4, 1), num_labels=2, id2label=beyond)
    many = {i: f"name {i}" for i in range(40)}
    refuses(f"{path}:40", "name 11, ...", shape=(4, 4, 1), num_labels=40, id2label=many)


def test_labels_for_a_model_without_labels(tmp_path):
    path = save(tmp_path / "0" / "a.png", random_pixels(4, 4))
    refuses(f"{path}:1", "takes no labels", **PLAIN)
    refuses(f"{tmp_path}:0", "takes no labels", **PLAIN)


def test_labels_that_are_missing(tmp_path):
    path = save(tmp_path / "train" / "a.png", random_pixels(4, 4))
    ways = ("sub-folders", "npz", "PATH:LABEL")
    refuses(str(path), "labels are missing", *ways, **MODEL)
    refuses(str(tmp_path), "labels are missing", "sub-folders train", *ways, **MODEL)
    save_npz(tmp_path / "a.npz", images=random_pixels(2, 4, 4), label=np.zeros(2, int))
    refuses(f"{tmp_path}/a.npz", "labels are missing", "images, label", *ways, **MODEL)


def test_folders_of_which_some_are_labels(tmp_path):
    save(tmp_path / "1" / "a.png", random_pixels(4, 4))
    stray = save(tmp_path / "other" / "b.png", random_pixels(4, 4))
    refuses(str(tmp_path), stray, "0..2", **MODEL)
    refuses(f"{tmp_path}:1", stray, "PATH:LABEL", **MODEL)


def test_empty_selection(tmp_path):
    save(tmp_path / "1" / "a.png", random_pixels(4, 4))
    refuses(f"{tmp_path}:Ankle boot", "selects nothing", "label 2", "only 1", **MODEL)


def test_ambiguous_labels(tmp_path):
    path = save(tmp_path / "a.png", random_pixels(4, 4))
    options = {"shape": (4, 4, 1), "num_labels": 8}
    twice = {0: "crane", 1: "Crane"}
    refuses(f"{path}:crane", "ambiguous", "0 (crane) or 1 (Crane)", id2label=twice, **options)
    refuses(f"{path}:7", "ambiguous", "3 (7)", id2label=NAMES, **options)
    digits = {i: str(i) for i in range(8)}
    assert data.read_images(f"{path}:7", id2label=digits, **options).labels.tolist() == [7]


# ------------------------------------------------------------------ sets of images


def test_take_and_concatenate_are_inverse():
    images = images_of(random_pixels(5, 4, 4, 1), [0, 1, 2, 1, 0])
    both = data.concatenate([data.take(images, [0, 1]), data.take(images, [2, 3, 4])])
    jax.tree.map(np.testing.assert_array_equal, both[:2], images[:2])
    assert both.names == images.names


def test_concatenate_refuses():
    labelled, plain = (
        images_of(random_pixels(1, 4, 4, 1), [0]),
        images_of(random_pixels(1, 4, 4, 1)),
    )
    with pytest.raises(ValueError, match="2 sets .* 1 have labels: .* all or none"):
        data.concatenate([labelled, plain])
    with pytest.raises(ValueError, match=re.escape("(4, 4, 1), (5, 4, 1)")):
        data.concatenate([plain, images_of(random_pixels(1, 5, 4, 1))])
    with pytest.raises(ValueError, match="one shape"):
        data.concatenate([])


def test_content_hashes_know_the_shape_and_the_order():
    pixels = random_pixels(3, 4, 2, 1)
    hashes = data.content_hashes(pixels)
    assert len(set(hashes)) == 3
    assert data.content_hashes(pixels[::-1]) == hashes[::-1]
    assert not set(hashes) & set(data.content_hashes(pixels.reshape(3, 2, 4, 1)))


def test_remove_overlap():
    pixels = random_pixels(6, 4, 4, 1)
    retain = images_of(pixels[[0, 1, 2, 1, 3]], [0, 1, 2, 3, 4])
    left, removed = data.remove_overlap(retain, [images_of(pixels[[1, 5]]), images_of(pixels[[3]])])
    assert removed == 3
    assert left.labels.tolist() == [0, 2]
    assert left.names == ("x[0]", "x[2]")
    same, removed = data.remove_overlap(retain, [images_of(pixels[5:])])
    assert removed == 0
    np.testing.assert_array_equal(same.pixels, retain.pixels)
    with pytest.raises(ValueError, match="nothing is left"):
        data.remove_overlap(retain, [retain])


def test_find_overlap():
    pixels = random_pixels(6, 4, 4, 1)
    first, second = images_of(pixels[[0, 1, 1, 2]]), images_of(pixels[[1, 2, 3]])
    assert data.find_overlap(first, second) == data.find_overlap(second, first) == 2
    assert data.find_overlap(first, images_of(pixels[4:])) == 0


def test_split_is_a_stratified_partition():
    images = images_of(random_pixels(100, 4, 4, 1), np.repeat([0, 1, 2], [50, 30, 20]))
    kept, held = data.split_held_out(images, fraction=0.1, seed=3, maximum=None)
    assert sorted(kept.names + held.names) == sorted(images.names)
    assert np.bincount(held.labels).tolist() == [5, 3, 2]
    for part in (kept, held):
        chosen = [images.names.index(name) for name in part.names]
        assert chosen == sorted(chosen)
        np.testing.assert_array_equal(part.pixels, images.pixels[chosen])
    again = data.split_held_out(images, fraction=0.1, seed=3, maximum=None)
    assert again[1].names == held.names
    assert data.split_held_out(images, fraction=0.1, seed=4)[1].names != held.names
    assert len(data.split_held_out(images, fraction=0.5, seed=3, maximum=7)[1].names) == 7


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_copies_together(seed):
    pixels = random_pixels(20, 4, 4, 1)[np.repeat(np.arange(20), [1, 2, 3, 4] * 5)]
    images = images_of(pixels, np.arange(len(pixels)) % 3)
    kept, held = data.split_held_out(images, fraction=0.3, seed=seed, maximum=20)
    assert data.find_overlap(kept, held) == 0
    assert len(kept.names) + len(held.names) == len(images.names)
    assert 1 <= len(held.names) <= 15


def test_split_refuses():
    images = images_of(random_pixels(4, 4, 4, 1))
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match="each side needs an image"):
            data.split_held_out(images, fraction=fraction, seed=0)
    with pytest.raises(ValueError, match="4 images holds out 0"):
        data.split_held_out(images, fraction=0.1, seed=0)
    with pytest.raises(ValueError, match="4 images holds out 4"):
        data.split_held_out(images, fraction=0.9, seed=0)
    with pytest.raises(ValueError, match="maximum 0: .* maximum >= 1"):
        data.split_held_out(images, fraction=0.5, seed=0, maximum=0)
    with pytest.raises(ValueError, match="seed >= 0"):
        data.split_held_out(images, fraction=0.5, seed=-1)
    copies = images_of(random_pixels(1, 4, 4, 1)[[0] * 4])
    with pytest.raises(ValueError, match="identical images stay together, at least 4"):
        data.split_held_out(copies, fraction=0.5, seed=0)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(("size", "count"), [(1, 1), (3, 7), (7, 7), (10, 7), (50, 7), (4, 12)])
def test_every_epoch_is_a_permutation(size, count):
    steps = range(-(-4 * count // size))
    stream = np.concatenate(
        [data.batch_indices(seed=5, step=step, size=size, count=count) for step in steps]
    )
    assert stream.dtype == np.int64
    epochs = stream[: 4 * count].reshape(4, count)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (4, 1)))
    if count > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_stream_does_not_depend_on_the_batch_size():
    def stream(size):
        batches = [
            data.batch_indices(seed=1, step=i, size=size, count=9) for i in range(36 // size)
        ]
        return np.concatenate(batches)

    np.testing.assert_array_equal(stream(4), stream(36))
    np.testing.assert_array_equal(stream(3), stream(36))


def test_batches_are_pure_in_seed_and_step():
    def batch(step, seed=0):
        return data.batch_indices(seed=seed, step=step, size=8, count=50).tolist()

    forward = [batch(step) for step in range(60)]
    batches.permutation.cache_clear()
    assert [batch(step) for step in reversed(range(60))] == forward[::-1]
    batch(3)[0] = -1  # A caller's writing does not reach the cache.
    assert batch(3) == forward[3]
    assert batch(3, seed=1) != forward[3]
    assert len(batch(10**12)) == 8


@pytest.mark.parametrize(("size", "m"), [(8, 4), (10, 4), (3, 7), (1, 3), (5, 5), (7, 1), (4, 8)])
def test_constraints_share_each_batch_and_rotate(size, m):
    counts = [2 + i for i in range(m)]
    total = np.zeros(m, int)
    for step in range(m):
        constraint, image = data.balanced_indices(seed=0, step=step, size=size, counts=counts)
        assert constraint.shape == image.shape == (size,)
        assert constraint.dtype == image.dtype == np.int64
        assert (image >= 0).all()
        assert (image < np.asarray(counts)[constraint]).all()
        slots = np.bincount(constraint, minlength=m)
        assert set(slots) <= {size // m, -(-size // m)}
        total += slots
    np.testing.assert_array_equal(total, np.full(m, size))


def test_each_constraint_draws_epochs_of_its_own():
    counts = [5, 1, 8]
    pairs = [data.balanced_indices(seed=2, step=i, size=4, counts=counts) for i in range(60)]
    constraint, image = (np.concatenate(part) for part in zip(*pairs, strict=True))
    for i, count in enumerate(counts):
        drawn = image[constraint == i]
        epochs = drawn[: len(drawn) // count * count].reshape(-1, count)
        np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (len(epochs), 1)))
    again = data.balanced_indices(seed=2, step=17, size=4, counts=counts)
    jax.tree.map(np.testing.assert_array_equal, again, pairs[17])


def test_constraints_of_one_size_have_different_orders():
    constraint, image = data.balanced_indices(seed=0, step=0, size=40, counts=[20, 20])
    assert image[constraint == 0].tolist() != image[constraint == 1].tolist()


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"step": -1}, {"size": 0}, {"counts": []}, {"counts": [3, 0]}]
)
def test_batches_refuse(change):
    options = {"seed": 0, "step": 0, "size": 4, "counts": [3]} | change
    with pytest.raises(ValueError, match="must not be negative"):
        data.balanced_indices(**options)
    if len(options["counts"]) == 1:
        count = options.pop("counts")[0]
        with pytest.raises(ValueError, match="must not be negative"):
            data.batch_indices(**options, count=count)


# ------------------------------------------------------------------ ranges


def test_unit_range_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for convert in (data.to_unit_range, jax.jit(data.to_unit_range)):
        images = convert(pixels)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, pixels / 127.5 - 1.0, atol=2e-7)
        assert float(images.min()) == -1.0
        assert float(images.max()) == 1.0
        np.testing.assert_array_equal(data.to_pixels(images), pixels)
    bfloat16 = data.to_pixels(images.astype("bfloat16"))
    np.testing.assert_allclose(bfloat16.astype(int), pixels, atol=1)


def test_to_pixels_rounds_and_clips():
    values = np.array([-np.inf, -3, -1, -1 + 0.9 / 255, 0.999, 1, 2, np.inf])
    assert data.to_pixels(values).tolist() == [0, 0, 0, 0, 255, 255, 255, 255]
    with pytest.raises(ValueError, match="nan"):
        data.to_pixels(np.array([0, np.nan]))
