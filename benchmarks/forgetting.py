"""The results of the README: forgetting a class, and sixteen single images, over seeds.

    python benchmarks/forgetting.py --seeds 0 1 2 --out benchmarks/results

Runs `jax-unlearn demo` for each seed and task, with its pictures in a temporary folder, and
writes one JSON a task with every seed's numbers and their mean and standard deviation.
"""

import argparse
import json
import pathlib
import platform
import tempfile

import jax
import numpy as np

from jax_unlearn.app import cli

GIVEN = ["--formulation", "forward-kl"]
# The first eight of the repeated images stand 64 times in the training set, the others 256 times.
TASKS = {
    "class": ["--forget", "Trouser", "--samples", "64", "--evaluation-images", "512"],
    "images": [
        "--forget", "repeated", "--weighting", "nelbo", "--steps", "300",
        "--learning-rate", "1e-4", "--forget-batch-size", "64", "--evaluation-images", "1024",
        "--samples", "32",
    ],
}  # fmt: skip


def numbers(task: str, report: dict) -> dict[str, float]:
    """The numbers of one run that the README names."""
    metrics = report["metrics"]
    nelbo = metrics["nelbo"]
    found = {
        "feasible": float(report["feasible"]),
        "objective": report["objective"]["value"],
        "satisfied": sum(one["satisfied"] for one in report["constraints"]),
        "seconds": report["seconds"],
    }
    if task == "images":
        means = [one["mean_multiplier"] for one in report["constraints"]]
        found["mean_multiplier_of_64"] = float(np.mean(means[:8]))
        found["mean_multiplier_of_256"] = float(np.mean(means[8:]))
        ratios = [one["value"] / one["threshold"] for one in report["constraints"]]
        found["value_over_threshold_least"] = min(ratios)
        found["value_over_threshold_most"] = max(ratios)
    for part in ("forgotten", "held_out"):
        found[f"nelbo_{part}_change"] = nelbo[part]["change"]["value"]
        found[f"nelbo_{part}_change_stderr"] = nelbo[part]["change"]["stderr"]
    for side in ("before", "after"):
        found[f"nelbo_forgotten_{side}"] = nelbo["forgotten"][side]["value"]
        found[f"nelbo_held_out_{side}"] = nelbo["held_out"][side]["value"]
        found[f"similarity_{side}"] = metrics["similarity"][side]["value"]
        found[f"kid_{side}"] = metrics["kid"][side]["value"]
        found[f"kid_stderr_{side}"] = metrics["kid"][side]["stderr"]
        found[f"fid_{side}"] = metrics["fid"][side]
        rates = {name: one["rate"] for name, one in metrics["agreement"][side].items()}
        if task == "class":
            found[f"agreement_forgotten_{side}"] = rates.pop("Trouser")
        found[f"agreement_kept_{side}"] = float(np.mean(list(rates.values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        runs = []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                out = pathlib.Path(folder) / "out"
                code = cli.main(
                    ["demo", *GIVEN, *TASKS[task], "--seed", str(seed), "--out", str(out)]
                )
                if code:
                    raise SystemExit(code)
                runs.append(numbers(task, json.loads((out / "report.json").read_text())))
        table = {
            name: {
                "mean": float(np.mean([run[name] for run in runs])),
                "standard_deviation": float(np.std([run[name] for run in runs], ddof=1))
                if len(runs) > 1
                else None,
            }
            for name in runs[0]
        }
        result = {
            "command": f"jax-unlearn demo {' '.join([*GIVEN, *TASKS[task]])}",
            "seeds": arguments.seeds,
            "machine": f"{platform.machine()}, {jax.device_count()} {jax.default_backend()}",
            "summary": table,
            "runs": runs,
        }
        (arguments.out / f"forgetting_{task}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
