"""Compares mathematical answers, one JSON line after the other: started and watched by `math_answers`.

A process of its own, because an answer such as 9^{9^{9^9}} keeps the computer algebra busy for ever,
in code that no signal interrupts.
"""

import json
import logging
import resource
import sys

MEMORY = 4 << 30


def main() -> None:
    """Reads {"reference", "answer"} and writes {"correct", "note"}, until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    import math_verify

    print("ready", flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        note = ""
        correct = False
        try:
            # No timeouts of the library's own: they are signals.
            reference, answer = (
                math_verify.parse(given[name], parsing_timeout=None)
                for name in ("reference", "answer")
            )
            if answer:
                correct = math_verify.verify(reference, answer, timeout_seconds=None)
            else:
                note = "no answer"
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
        print(json.dumps({"correct": bool(correct), "note": note}), flush=True)


if __name__ == "__main__":
    main()
