"""`python -m neuronjit.compat train.py ...`: a script for old SpikingJelly, as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import install


def main() -> None:
    """Run the script that is named first, as Python itself would, after `install()`."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f"no file {sys.argv[1]}" if len(sys.argv) > 1 else "no script given"
        sys.exit(f"{given}. Usage: python -m neuronjit.compat SCRIPT [its arguments]")
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
