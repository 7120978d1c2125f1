"""Run a script under the emulator: ``python -m tests.emulator RUN.py --trace warp=0 lines=10-90``.

The script calls ``tests.emulator.emulate.emulate`` as a test would; the options given here are the
settings of every call that names none.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from tests.emulator import trace
from tests.emulator.emulate import DEFAULTS
from tests.emulator.errors import EmulatorError
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings


def main() -> int:
    """Exit code 1 and one message if the kernel or the arguments are at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("script", nargs="?")
    parser.add_argument("--mode", choices=MODES, default="eager", help="of asynchronous work")
    parser.add_argument("--schedule", choices=("round_robin", "random"), default="round_robin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", nargs="*", metavar="KEY=VALUE", help="warp=, rank=, lines=")
    options = parser.parse_args()
    words, script = options.trace, options.script
    if script is None and words and "=" not in words[-1]:
        script = words.pop()  # --trace takes all words up to the next option
    if script is None:
        parser.error("which script?")
    if not Path(script).exists():
        parser.error(f"there is no script {script}")
    tracing = None
    try:
        if words is not None:
            tracing = trace.Tracer(trace.parse(words))
        DEFAULTS.set(
            Settings(mode=options.mode, schedule=options.schedule, seed=options.seed, trace=tracing)
        )
        runpy.run_path(script, run_name="__main__")
    except EmulatorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        if tracing is not None:
            tracing.flush()
    return 0


sys.exit(main())
