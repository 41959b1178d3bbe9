"""The cost of misf-batch's driver: pictures per second with workers that do nothing, and memory by length of the list.

    python benchmarks/batch_driver.py --entries 10000 100000 1000000

Each length runs in a separate process, with two workers of a local Ray cluster, on a list of JSON Lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Nothing:
    """A worker without a model, which needs no time for a picture."""

    def backend(self) -> str:
        """Return the name of the backend."""
        return "nothing"

    def fill(self, entries: list[Any]) -> list[dict[str, Any]]:
        """Return a record for each entry immediately."""
        return [{"input": entry.image, "output": entry.output, "status": "done", "seconds": 0.0} for entry in entries]


def drive(path: Path) -> dict[str, float]:
    """Return pictures per second and the process's peak memory in MB for one list."""
    import ray

    from misf.runtime.batch.driver import run
    from misf.runtime.batch.entries import entries

    ray.init(include_dashboard=False, log_to_driver=False)
    actor = ray.remote(num_cpus=1)(Nothing)
    records = run(entries(str(path), "mask.png", "out"), actor.remote, {"CPU": 1.0})
    next(records)  # by now the workers have started
    started, count = time.perf_counter(), 0
    with path.with_suffix(".report").open("w", encoding="utf-8") as report:
        for record in records:
            report.write(json.dumps(record) + "\n")
            report.flush()
            count += 1
    seconds = time.perf_counter() - started
    ray.shutdown()
    return {"per_second": count / seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        print(json.dumps(drive(options.drive)))
        return
    print("| entries | pictures per second | driver's peak memory, MB |\n| ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for count in options.entries:
            path = Path(folder) / f"{count}.jsonl"
            with path.open("w", encoding="utf-8") as lines:
                lines.writelines(
                    json.dumps({"image": f"s3://photos/{number:08d}.jpg"}) + "\n" for number in range(count)
                )
            done = subprocess.run(
                [sys.executable, __file__, "--drive", str(path)], check=True, capture_output=True, text=True
            )
            result = json.loads(done.stdout.splitlines()[-1])
            print(f"| {count} | {result['per_second']:.0f} | {result['peak_mb']:.0f} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
