"""Ask a GPU machine everything about this project that a CPU cannot answer, in at most nine minutes.

Needs a Python with torch and no network; what else is missing is taken from a folder of wheels that
benchmarks/gpu/fetch_wheels.sh has filled. Without a GPU it tries itself at tiny sizes on the CPU.

example: python3 launchers/gpu_check.py
         python3 launchers/gpu_check.py --parts facts million --total 120 --wheels .gpu/whl
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".gpu" / "whl"
sys.path.insert(0, str(ROOT))  # nothing of this project has to be installed

from benchmarks.gpu import plan  # noqa: E402
from benchmarks.gpu.driver import Check, dry_run  # noqa: E402
from benchmarks.gpu.machine import Unfit  # noqa: E402


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Results go to $OUT where that is set, else to runs/gpu-TIME: summary.txt, results.json, logs.tgz, "
               "rewritten after every part, and benchmarks/results/gpu-CARD-DATE.json and .txt at the end. Exit "
               "status: 0, 1 where something is not as it should be or a part had no time, 2 a mistake of the user's.")
    parser.add_argument("--parts", nargs="+", metavar="PART",
                        help=f"only these, of: {', '.join(part.name for part in plan.PARTS)}")
    parser.add_argument("--total", type=float, default=plan.TOTAL, metavar="SECONDS",
                        help=f"for all parts; the least important ones are left out ({plan.TOTAL})")
    parser.add_argument("--wheels", type=Path, metavar="DIR",
                        help="install these into a temporary directory (.gpu/whl where there is one)")
    parser.add_argument("--dry-run", action="store_true", help="print the parts and their seconds; nothing is run")
    args = parser.parse_args(argv)
    if not args.total > 0:
        parser.error(f"--total {args.total:g}: must be more than 0 seconds")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such directory: fill one with benchmarks/gpu/fetch_wheels.sh DIR")
    try:
        args.parts = plan.chosen(args.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: as --help says."""
    args = parse_args(argv)
    if args.dry_run:
        print(dry_run(args.parts, os.cpu_count() or 1, args.total))
        return 0
    out = Path(os.environ.get("OUT") or ROOT / "runs" / f"gpu-{datetime.now():%Y%m%d-%H%M%S}")
    wheels = args.wheels or (WHEELS if WHEELS.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        try:
            whole = Check(ROOT, out, Path(work), total=args.total, started=STARTED).run(args.parts, wheels)
        except (Unfit, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"results: {out}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
