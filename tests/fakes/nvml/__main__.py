"""Prints the path of the compiled fake GPU driver, for a shell; ``--old`` for the old driver's."""

import sys

from tests.fakes.nvml import BuildError, build

try:
    print(build(old="--old" in sys.argv[1:]))
except BuildError as error:
    sys.exit(str(error))
