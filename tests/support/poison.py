"""A request that kills the service that computes it, for tests; it is not in the product.

As in lost_device.py, a `sitecustomize` changes the process of `python -m serving`: a step with a
row whose seed is SEED kills the process, as a fault in a driver does.
"""

import os
from pathlib import Path

SEED = 666_666
_PROGRAM = f"""
import os, signal, sys, threading, time

def change():
    while not hasattr(sys.modules.get("serving.engine.runner"), "Runner"):
        time.sleep(0.05)
    from serving.engine.runner import Runner

    launch = Runner.launch

    def checked(self, plans):
        if any(chunk.sampling.seed == {SEED} for plan in plans for chunk in plan.chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(self, plans)

    Runner.launch = checked

if "serving" in sys.orig_argv:
    threading.Thread(target=change, daemon=True).start()
"""


def environment_for(folder: Path) -> dict[str, str]:
    """Returns variables for `tests.support.servers.running`; `folder` is an empty folder."""
    (folder / "sitecustomize.py").write_text(_PROGRAM, encoding="utf-8")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
