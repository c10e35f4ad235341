"""Trial: a process that compiles what callers ask for before the server does, and may die of it.

Some grammars overflow the compiler's stack, never end or take all memory. They do so here, and so
do patterns of schemas that finished answers are checked against. The parent writes one line of JSON
with the vocabulary, then one line for each trial or check, and reads one line back for each. This
process ends when its standard input does, also in the middle of a trial.
"""

import base64
import json
import os
import pickle
import queue
import resource
import signal
import sys
import threading
import time
from dataclasses import astuple
from functools import partial
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.form import form_of
from mixtral_jax.structure.json_schema.checker import check_answer
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.structure.specification import Grammar
from mixtral_jax.structure.wanted import Wanted, tried_grammar
from mixtral_jax.tokenization.vocabulary import Vocabulary

_MEMORY = 1 << 30  # bytes that trials may take beside the vocabulary
_SLOWEST = 0.7  # seconds of CPU; the server spends as much again on what is accepted


class _Pieces(Vocabulary):
    """A vocabulary that writes nothing, for masks alone."""

    def encode(self, text: str) -> list[int]:
        """Raises StructureError: a trial needs no ids of texts."""
        raise StructureError("this vocabulary has no encoder")


def main() -> None:
    """Reads the vocabulary and serves trials until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    lines = sys.stdin.buffer
    opening = json.loads(lines.readline())
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(opening["stack"])
    threading.Thread(target=_serve, args=(opening, requests), daemon=True).start()
    for line in lines:
        requests.put(line)
    os._exit(0)  # the other thread may be in the middle of a trial that never ends


def _serve(opening: dict[str, Any], requests: "queue.SimpleQueue[bytes]") -> None:
    pieces = [base64.b64decode(piece) for piece in opening["pieces"].split(",")]
    guide = Guide(_Pieces(pieces, opening["eos_ids"]), len(pieces))
    _bound_memory()
    _answer({"ready": True})
    while True:
        request = json.loads(requests.get())
        begin = time.thread_time()
        try:
            if "answer" in request:
                _answer({"violation": check_answer(**request)})
                continue
            grammar = _tried(request, guide)
            spent = time.thread_time() - begin
            if spent > _SLOWEST:
                raise StructureError("the structure takes too long to compile: make it smaller")
        except StructureError as error:
            _answer({"error": str(error), "pointer": error.pointer})
        except RecursionError:
            _answer({"error": "the structure nests too deeply to be compiled", "pointer": ""})
        except BaseException:  # MemoryError, or a fault of ours, for which nobody shall wait
            os._exit(1)
        else:
            _answer(
                {
                    "text": grammar.text,
                    "begins_after": grammar.begins_after,
                    "weakened": grammar.weakened,
                    "checks": [astuple(check) for check in grammar.checks],
                }
            )


def _tried(request: dict[str, Any], guide: Guide) -> Grammar:
    wanted: Wanted = pickle.loads(base64.b64decode(request["wanted"]))  # of the parent
    attempt = partial(form_of, guide=guide)
    return tried_grammar(wanted, space=request["space"], attempt=attempt)


def _answer(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _bound_memory() -> None:
    """Bounds this process's memory; where that cannot be measured there is no bound."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))


main()
