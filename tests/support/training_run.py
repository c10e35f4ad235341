"""A run in a process of its own: `python -m tests.support.training_run FOLDER STEPS [SECONDS]`.

It prints a line of JSON for each step, and at the end a digest of the trained arrays. SECONDS is
how long it waits between two steps. With PROCESS_ID, NUM_PROCESSES and COORDINATOR set it is one
of several processes.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import jax

from mixtral_jax.cli.train.stopping import Stopping
from mixtral_jax.training.loop import Trainer
from mixtral_jax.training.records import EndRecord, StepRecord
from tests.support.models import model_of
from tests.support.training import DENSE, Counting, settings


def main(folder: Path, steps: int, pause: float = 0.0) -> None:
    """Runs to the end, or until it is killed."""
    mesh = None
    if coordinator := os.environ.get("COORDINATOR"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator, int(os.environ["NUM_PROCESSES"]), int(os.environ["PROCESS_ID"])
        )
        mesh = f"data={jax.device_count()}"
    run = settings(steps=steps, checkpoint_every=2, keep=2, micro_batches=2)
    trainer = Trainer(model_of(DENSE, mesh=mesh), run, Counting(DENSE, run.rows), folder=folder)
    stopping = Stopping(lambda text: print(text, file=sys.stderr), lambda: "stopped")
    with stopping, stopping.finishing(trainer.stop):
        for record in trainer.records():
            if isinstance(record, StepRecord):
                # Hexadecimal: every bit is there.
                print(json.dumps({"step": record.step, "loss": record.loss.hex()}), flush=True)
                time.sleep(pause)
            if isinstance(record, EndRecord):
                digest = hashlib.sha256()
                whole = trainer.program.trainee.whole(trainer.trained)
                for leaf in jax.tree.leaves(jax.device_get(whole)):
                    digest.update(leaf.tobytes())
                end = {"end": record.is_finished, "digest": digest.hexdigest()}
                print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
