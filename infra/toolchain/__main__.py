"""
Run the set-up: `python3 infra/toolchain setup`.

Standard library only, because it runs before the virtual environment exists, with the system's own python3. This file
keeps to syntax that old interpreters can read, so that they get a sentence and not a traceback.
"""

import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - this line is for the interpreters below the minimum
    sys.stderr.write(
        "error: Memharbor needs Python 3.11 or newer, and `python3` is {}.{}\n"
        "hint: on Debian 12, Debian 13 or Ubuntu 24.04: `apt-get install python3 python3-venv`\n".format(
            *sys.version_info[:2]
        )
    )
    sys.exit(3)

# Python put this folder on the path; the package is the folder itself, seen from the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from toolchain.command import main  # noqa: E402 - the version check and the path have to come first

sys.exit(main(sys.argv[1:]))
