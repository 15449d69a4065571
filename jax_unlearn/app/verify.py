"""Whether a finished folder is still what the run left: files, digests, identity, report, page."""

import html
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.identity import digest_of, saved_legs
from jax_unlearn.app.report import read_rows, verdict
from jax_unlearn.app.rows import rows_digest
from jax_unlearn.models.files import read_json
from jax_unlearn.pretrained.digests import file_digest

__all__ = ["SUMS", "model_digests", "seal", "verify", "write_sums"]

SUMS = "SHA256SUMS"
"""The last file that a run writes: `sha256sum --check SHA256SUMS` reads it too."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
# What can be made again, or belongs to a run that goes on, is not summed.
_PASSED = ("checkpoints", "damaged_checkpoints")


def model_digests(out: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file of OUT/model, by its path in OUT."""
    return {name: file_digest(out / name) for name in _files(out) if name.startswith("model/")}


def _files(out: pathlib.Path) -> Iterator[str]:
    """Paths of the results in a folder, without runs of their own inside it."""
    for top in sorted(out.iterdir()):
        # Checkpoints are not looked into: old ones may be being deleted.
        if top.name in (*_PASSED, SUMS) or (top / "run.json").is_file():
            continue
        for path in [top, *sorted(top.rglob("*"))]:
            name = path.relative_to(out)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                yield name.as_posix()


def write_sums(out: pathlib.Path) -> None:
    """Writes SHA256SUMS of all results in a folder; its digest seals all of them."""
    lines = [f"{file_digest(out / name)}  {name}\n" for name in _files(out)]
    replace_file(out / SUMS, "".join(lines).encode())


def seal(out: pathlib.Path) -> str:
    """SHA-256 of SHA256SUMS: kept elsewhere, it proves that no file was replaced together with it.

    Raises:
      ValueError: if the run has not finished.
    """
    if not (out / SUMS).is_file():
        raise ValueError(f"{out} has no {SUMS}: no run has finished there.")
    return file_digest(out / SUMS)


def verify(out: pathlib.Path) -> tuple[list[str], int]:
    """Checks a finished folder, and those of the runs in it.

    Returns:
      What does not match, a line each; and how many files were compared.

    Raises:
      ValueError: if no run has finished there, or its sums cannot be read.
    """
    seal(out)
    sums = _read_sums(out / SUMS)
    problems = []
    for name, digest in sums.items():
        if not (out / name).is_file():
            problems.append(f"{name} is missing")
        elif file_digest(out / name) != digest:
            problems.append(f"{name} is not the file that the run left")
    problems += [f"{name} is not of the run" for name in _files(out) if name not in sums]
    if not problems and (out / "report.json").is_file():
        try:
            problems = _contradictions(out, read_json(out / "report.json"))
        except (KeyError, TypeError, AttributeError):
            problems = ["report.json lacks what the report of a run has"]
        except ValueError as error:
            problems = [str(error)]
    count = len(sums)
    for inner in sorted(out.iterdir()):
        if (inner / "run.json").is_file():
            if not (inner / SUMS).is_file():
                problems.append(f"{inner.name} has not finished")
                continue
            found, more = verify(inner)
            problems += [f"{inner.name}: {problem}" for problem in found]
            count += more
    return problems, count


def _read_sums(path: pathlib.Path) -> dict[str, str]:
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or ".." in pathlib.PurePosixPath(match[2]).parts or match[2][0] == "/":
            raise ValueError(f"{path}, line {number}: expected a digest and a name in the folder.")
        sums[match[2]] = match[1]
    return sums


def _contradictions(out: pathlib.Path, report: dict[str, Any]) -> list[str]:
    """Whether what a command wrote agrees."""
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    checks = _of_audit(out, report) if report.get("kind") == "audit" else _of_run(out, report)
    said = report["verdict"] if report.get("kind") == "audit" else verdict(report)
    checks["report.html is the page of another report.json"] = (
        f'content="sha256:{file_digest(out / "report.json")}"' in page and said in page
    )
    return [problem for problem, holds in checks.items() if not holds]


def _of_audit(out: pathlib.Path, report: dict[str, Any]) -> dict[str, bool]:
    """Whether run.json and report.json of an audit agree."""
    run = read_json(out / "run.json")
    identity = {name: part for name, part in report["identity"].items() if name != "digest"}
    digests = {report["identity"]["digest"], digest_of(identity), run["digest"]}
    same = digests == {digest_of(run["identity"])}
    return {"report.json and run.json are of different audits": same}


def _of_run(out: pathlib.Path, report: dict[str, Any]) -> dict[str, bool]:
    """Whether run.json, metrics.jsonl, report.json and the model of a run agree."""
    run = read_json(out / "run.json")
    identity = {name: part for name, part in report["identity"].items() if name != "digest"}
    legs = saved_legs(out / "run.json")
    rows = report["rows"]
    return {
        "report.json and run.json are of different runs": (
            report["identity"]["digest"] == digest_of(identity) == legs[-1].digest
            and identity == run["identity"]
            and [{**leg, "changed": tuple(leg["changed"])} for leg in report["legs"]]
            == [leg._asdict() for leg in legs]
        ),
        "report.json is of other rows than those of metrics.jsonl": (
            rows["count"] == len(read_rows(out / "metrics.jsonl")) == report["steps"]
            and rows["digest"] == rows_digest(out / "metrics.jsonl", rows["count"])
        ),
        "report.json lists another model than that in model": report["files"] == model_digests(out),
    }
