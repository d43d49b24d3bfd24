"""What the command line costs before it does anything: CPU seconds (user and system, of the process and its children).

    python benchmarks/bench_cli.py [--against CHECKOUT] [--rounds 5] [--save]

``--against`` alternates with another checkout of fastreft, run by this Python with that one first on its path.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from harness import parser, save

HERE = Path(__file__).resolve().parent.parent
FLAGS = ["train", "--model", "embedded", "--train_file", __file__, "--output_dir", "nowhere"]
CASES = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "generate --help": ["generate", "--help"],
    "an unknown flag": [*FLAGS, "--lerning_rate", "1"],
    "a bad value": [*FLAGS, "--learning_rate", "fast"],
    "bad positions": [*FLAGS, "--positions", "f0"],
    "no such YAML": ["train", "--config", "nowhere.yaml"],
    "info": ["info"],
}


def cost(checkout: Path, argv: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one command."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    subprocess.run([sys.executable, "-m", "fastreft", *argv], env=env, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, perf_counter() - start


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--against", type=Path)
    options = flags.parse_args()
    checkouts = {"here": HERE} | ({"against": options.against.resolve()} if options.against else {})
    found: dict[str, dict[str, list[tuple[float, float]]]] = {case: {name: [] for name in checkouts} for case in CASES}
    for _ in range(options.rounds):
        for case, argv in CASES.items():
            for name, checkout in checkouts.items():
                found[case][name].append(cost(checkout, argv))
    results = {}
    for case, sides in found.items():
        medians = {
            name: {"cpu_s": median(cpu for cpu, _ in runs), "wall_s": median(wall for _, wall in runs)}
            for name, runs in sides.items()
        }
        results[case] = medians
        print(
            f"{case:18}"
            + "".join(f"  {name} {m['cpu_s']:6.2f} s CPU {m['wall_s']:6.2f} s" for name, m in medians.items())
        )
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
