"""What tests of audits share: the one line of a refusal, and the rows of a report."""

import json

__all__ = ["refused", "report_of", "rows_of"]


def refused(capsys, *said):
    message = capsys.readouterr().err
    assert message.startswith("jax-unlearn: "), message
    assert message.count("\n") == 1, message
    assert all(part in message for part in said), message


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def rows_of(report):
    return [*report["forgotten"], *report["recoverable"]]
