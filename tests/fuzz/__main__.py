"""Fuzz the backend with generated MoE modules.

python -m tests.fuzz --cases 10000 --seed 0     seeds 0 .. 9999; fails if one is wrong or crashes
python -m tests.fuzz --case 4711                one of them again, with what was made and the traceback
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch

from tests.fuzz.check import Tally, Verdict, check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed")
    parser.add_argument("--case", type=int, help="reproduce one case")
    parser.add_argument("--all", action="store_true", help="print every case, not only failures")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what torch.empty returns is filled with NaN
    if a.case is not None:
        verdict = check(a.case)
        print(verdict, verdict.trace, sep="\n")
        return int(verdict.failed)
    tally, start = Tally(), time.perf_counter()
    for seed in range(a.seed, a.seed + a.cases):
        verdict = check(seed)
        tally.verdicts.append(verdict)
        if verdict.failed or a.all:
            _clear()
            print(verdict, flush=True)
        _progress(tally, a.cases, time.perf_counter() - start, verdict)
    _clear()
    print(tally, f"in {time.perf_counter() - start:.0f} s")
    for count, reason, seed in tally.reasons():
        print(f"{count:5} declined, as in case {seed}: {reason}")
    return int(bool(tally.failures))


def _progress(tally: Tally, cases: int, seconds: float, last: Verdict) -> None:
    done = len(tally.verdicts)
    line = f"{done}/{cases}  {done / seconds:.1f}/s  {len(tally.failures)} failed  {tally.fused_share:.0%} fused"
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}  last {last.case.seed}")
        sys.stderr.flush()
    elif done % 500 == 0:
        print(line, file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


if __name__ == "__main__":
    sys.exit(main())
