"""A way for tests to lose the devices of a running service, which is not in the product.

`environment_for` puts a `sitecustomize` on the path of the processes that a test starts. In the
process of `python -m serving` it waits for SIGURG, for which the product has no use; from then on
every step raises, and so does making the pages anew.
"""

import os
from pathlib import Path

_PROGRAM = """
import signal, sys

def lose(number, frame):
    from serving.engine.runner import Runner

    def lost(*arguments):
        raise RuntimeError("the device is lost")

    Runner.launch = Runner.walk = Runner.draw = Runner.reset = lost

if "serving" in sys.orig_argv:
    signal.signal(signal.SIGURG, lose)
"""


def environment_for(folder: Path) -> dict[str, str]:
    """Returns variables for `tests.support.servers.running`; `folder` is an empty folder."""
    (folder / "sitecustomize.py").write_text(_PROGRAM, encoding="utf-8")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
