"""
`abscot data` that notes which rows it tokenises: a script of its own (tests/test_prepare.py), so that it may fork.

Each line read is a run in a forked process: its fields, seconds to sleep a row, and the answer that kills the process
that comes upon it. Prints the run's process id, then its exit code.
"""

import json
import os
import sys
import time

from abscot_trl.data import prepare, rows
from abscot_trl.data.arguments import DataArguments


def attempt(given: dict) -> None:
    """Shards and chunks are small, so that a run can be killed in the midst."""
    prepare.SHARD, prepare.CHUNK = given["shard"], given["chunk"]
    encode = rows.answer_ids

    def note(answer, tokenizer):
        if answer == given.get("dies"):
            os._exit(9)
        with open(given["log"], "a") as log:
            log.write(answer + "\n")
        time.sleep(given.get("sleep", 0))
        return encode(answer, tokenizer)

    rows.answer_ids = note
    prepare.prepare(DataArguments(**given["fields"]))


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                attempt(json.loads(line))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
