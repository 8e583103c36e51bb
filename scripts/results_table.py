"""The tables of docs/results.md from the runs of `scripts/results.sh`: python scripts/results_table.py FOLDER."""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from scipy.stats import t

Scores = dict[int, float]
"""Top-1 on the held-out digits in percent, by seed."""


def main(folder: Path) -> None:
    """Prints, for every variant and number of labels, the rate with the best mean, and differences between variants."""
    runs: dict[tuple[str, int], dict[float, Scores]] = defaultdict(lambda: defaultdict(dict))
    for file in folder.glob("finetune/*/*/summary.json"):
        shots, rate, seed = file.parent.name.split("_")
        accuracy = 100 * json.loads(file.read_text())["val_acc1"]
        runs[file.parent.parent.name, int(shots)][float(rate) * 25 / 256][int(seed)] = accuracy
    best = {key: max(rates.items(), key=lambda item: statistics.fmean(item[1].values())) for key, rates in runs.items()}
    print("| start | images per class | seeds | top-1, by learning rate | best |\n|---|---|---|---|---|")
    for (name, shots), rates in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = ", ".join(
            f"{rate:.1e}: {statistics.fmean(scores.values()):.1f}" for rate, scores in sorted(rates.items())
        )
        scores = best[name, shots][1]
        print(f"| {name} | {shots} | {len(scores)} | {cells} | {interval(list(scores.values()))} |")
    print("\n| compared | images per class | difference in points, seed by seed |\n|---|---|---|")
    for (name, shots), (rate, scores) in sorted(best.items(), key=lambda item: (item[0][1], item[0][0])):
        standard = _standard(name)
        if name == standard or (standard, shots) not in best:
            continue
        # Best against best, or at the same rate, where the variant was given only one.
        reference = runs[standard, shots][rate] if len(runs[name, shots]) == 1 else best[standard, shots][1]
        differences = [reference[seed] - scores[seed] for seed in sorted(scores.keys() & reference.keys())]
        print(f"| {standard} - {name} | {shots} | {interval(differences, sign='+')} |")


def _standard(name: str) -> str:
    """What a variant is compared with: the one that is trained alike but for one thing."""
    if name.startswith("crops-"):
        return "crops-fcmae"
    return "recipe" if name.startswith("recipe") else "fcmae"


def interval(values: list[float], sign: str = "") -> str:
    """The mean and the half width of its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.1f} ± {half:.1f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
