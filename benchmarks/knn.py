"""Peak memory of nearest neighbours beside the features: a table of docs/evaluation.md.

    python benchmarks/knn.py

Random features, each size in a process of its own, on the CPU.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
WIDTH, QUERIES, CLASSES = 384, 2_000, 1_000


def measure(images: int) -> str:
    """A row of the table."""
    import torch

    from vitkd_cli.evaluation.knn import vote

    def features(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(count, WIDTH), torch.arange(count) % CLASSES

    bank, queries = features(images), features(QUERIES)
    vote(*features(CLASSES), *features(1))  # whatever is loaded at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = vote(*bank, *queries)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = (bank[0].numel() + queries[0].numel()) * 4 / 2**20
    return f"| {images:,} | {found.count:,} | {size:.0f} MiB | {more / 2**10:.0f} MiB |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
        sys.exit()
    from test_docs import with_table

    lines = [
        f"| training images | scored | their features, of {WIDTH} | more at the peak |",
        "|---|---|---|---|",
    ]
    for images in (20_000, 200_000):
        command = [sys.executable, __file__, str(images)]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    print(written := "\n".join(lines))
    PAGE.write_text(with_table(PAGE.read_text(), "knn memory", written))
