"""The compiler process: a process whose jax has devices that are not here, and which compiles.

It can be interrupted, and leaves the caller's jax alone. It reads a job as JSON from its standard
input, and writes its progress and its report as lines of JSON to its standard output.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from mixtral_jax.errors import UserError
from mixtral_jax.planning.topology import environment
from mixtral_jax.roofline.chips import Topology

Fields = dict[str, Any]
Progress = Callable[[str], None]


class CompileError(UserError):
    """A program that the compiler refuses, such as one that does not fit."""


def report_of(module: str, job: Fields, topology: Topology, progress: Progress) -> Fields:
    """The report that a process of the module makes of a job, for the devices of a topology.

    The module's process calls `answer_job`. `progress` gets the lines that it reports. Raises
    CompileError with the compiler's message, or the last line of a process that died.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment(topology),
            text=True,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line) if line.startswith('{"') else {}
                if "progress" in message:
                    progress(message["progress"])
                if "error" in message:
                    raise CompileError(message["error"])
                if "report" in message:
                    report: Fields = message["report"]
                    return report
        finally:
            process.kill()
        stderr.seek(0)
        last = stderr.read().strip().splitlines()[-1:] or ["it wrote nothing"]
        raise CompileError(f"the compiler for {topology} ended without an answer: {last[0]}")


def answer_job(compiled: Callable[[Fields, Progress], Fields]) -> None:
    """Runs the process: reads a job, and writes what `compiled(job, progress)` makes of it."""

    def send(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    job = json.loads(sys.stdin.read())
    try:
        report = compiled(job, lambda line: send(progress=line))
    except Exception as error:
        # A compiler's message can be pages long; its subject is in the first line.
        send(error=str(error).strip().partition("\n")[0][:500])
    else:
        send(report=report)
