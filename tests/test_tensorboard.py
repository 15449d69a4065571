"""Events for TensorBoard, read back by a parser of their format that is written here."""

import importlib.util
import json
import math
import struct

import pytest

from jax_unlearn.app import cli
from jax_unlearn.app.report import read_rows
from jax_unlearn.app.stopping import Interrupted
from jax_unlearn.app.tensorboard import event_log, scalars
from jax_unlearn.app.verify import verify


def crc32c(data):
    """Castagnoli's, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    """Of a TFRecord file; every checksum is compared."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        head, data = content[place : place + 8], content[place + 12 : place + 12 + length]
        assert struct.unpack_from("<I", content, place + 8) == (masked(head),)
        assert struct.unpack_from("<I", content, place + 12 + length) == (masked(data),)
        yield data
        place += 16 + length


def fields(data):
    """Number and value of each field of a protocol buffer."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        size = {0: None, 1: 8, 2: None, 5: 4}[key & 7]
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if size is None else size
        yield key >> 3, data[place : place + size]
        place += size


def events(folder):
    """(step, {tag: value}) of each event, the first of which names the format."""
    (path,) = folder.glob("*.tfevents.*")
    first, *rest = [dict(fields(record)) for record in records(path)]
    assert first[3] == b"brain.Event:2"
    for event in rest:
        (time,) = struct.unpack("<d", event[1])
        assert 1.7e9 < time < 1e10
        values = [dict(fields(value)) for number, value in fields(event[5]) if number == 1]
        found = {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}
        assert len(found) == len(values)
        yield event[2], found


ROW = {
    "step": 1, "objective": 0.5, "values": [1.0, 2.0], "violations": [-1.0, None],
    "multipliers": [0.0, 3.0], "thresholds": [1.5, 2.5], "gradient_norm": 4.0, "seconds": 0.25,
}  # fmt: skip


def test_crc_of_the_published_check():
    assert crc32c(b"123456789") == 0xE3069283


def test_rows_become_scalars_of_each_constraint(tmp_path):
    names = ["a photo of a “cat”", "T-shirt/top"]
    with event_log(tmp_path / "tensorboard", names, [ROW]) as add:
        add(ROW | {"step": 300, "objective": math.inf})
    (one, first), (two, second) = events(tmp_path / "tensorboard")
    assert (one, two) == (1, 300)
    assert first == {
        "objective": 0.5, "gradient_norm": 4.0,
        "values/a photo of a “cat”": 1.0, "values/T-shirt/top": 2.0,
        "violations/a photo of a “cat”": -1.0,
        "multipliers/a photo of a “cat”": 0.0, "multipliers/T-shirt/top": 3.0,
        "thresholds/a photo of a “cat”": 1.5, "thresholds/T-shirt/top": 2.5,
    }  # fmt: skip
    assert second.keys() == first.keys() - {"objective"}


def test_constraints_of_one_name_stay_apart():
    assert {"values/a", "values/a (2)"} <= scalars(ROW, ["a", "a"]).keys()


SMALL = [
    "--steps", "5", "--batch-size", "16", "--forget-batch-size", "8", "--samples", "0",
    "--sampling-steps", "4", "--evaluation-images", "16", "--checkpoint-every", "2",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_resumed_has_each_step_once(tiny_model, tiny_images, tmp_path, monkeypatch):
    from jax_unlearn.app import run

    out = tmp_path / "out"
    given = ["data", "--model", str(tiny_model), "--forget", str(tiny_images["forget"])]
    given += ["--retain", str(tiny_images["retain"]), "--out", str(out), "--tensorboard", *SMALL]
    append = run.RowLog.append

    def killed(log, row):
        append(log, row)
        if row["step"] == 4:  # The checkpoint is that of step 2: 3 and 4 come again.
            raise Interrupted("killed", 9)

    with monkeypatch.context() as patch:
        patch.setattr(run.RowLog, "append", killed)
        assert cli.main(given) == 128 + 9
    assert [step for step, _ in events(out / "tensorboard")] == [1, 2, 3]
    assert cli.main(["data", "--out", str(out), "--resume"]) == 0
    rows = read_rows(out / "metrics.jsonl")
    found = list(events(out / "tensorboard"))
    assert [step for step, _ in found] == [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    names = [c["name"] for c in json.loads((out / "report.json").read_text())["constraints"]]
    for (_, event), row in zip(found, rows, strict=True):
        for part in ("values", "violations", "multipliers", "thresholds"):
            for name, value in zip(names, row[part], strict=True):
                assert event[f"{part}/{name}"] == pytest.approx(value, rel=1e-6)
        assert event["objective"] == pytest.approx(row["objective"], rel=1e-6)
    assert verify(out)[0] == []
    assert "tensorboard/events.out.tfevents" in (out / "SHA256SUMS").read_text()


def test_without_the_package_the_run_does_not_begin(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec

    def find(name, *rest):
        return None if name == "tensorboardX" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert cli.main(["demo", "--tensorboard", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "jax-unlearn: --tensorboard needs tensorboardX: pip install 'jax-unlearn[tensorboard]'."
    )
    assert not (tmp_path / "out").exists()
