"""How a run looks while it goes: a bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from mobilellm_jax.training.length import Length
from mobilellm_jax.training.metrics import STDERR


class Progress:
    """Steps done, loss and speed, on standard error; held-out results on standard output."""

    def __init__(self, start: int, length: Length, log_every: int, shown: bool = True) -> None:
        """Starts to count time; `log_every` is in steps; `shown` in one process of several."""
        self._length, self._log_every, self._shown = length, log_every, shown
        self._terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=length.steps,
            initial=start,
            unit="step",
            desc="train",
            disable=not self._terminal,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._recent: list[float] = []
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a finished step; values as recorded in metrics.jsonl."""
        text = f"loss {values['loss']:.3f}  {values['tokens_per_second'] / 1e3:,.1f}k tokens/s"
        if "bits_per_byte" in values:
            text += f"  {values['bits_per_byte']:.3f} bits/byte"
        if "mfu" in values:
            text += f"  {values['mfu']:.1%} MFU"
        if values["skipped"]:
            text += f"  {values['skipped']} skipped"
        if values.get("outliers"):
            text += f"  {values['outliers']:.0f} outliers"
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._recent = [*self._recent[-99:], values["step_seconds"]]
        steps = self._length.steps
        if self._shown and (step % self._log_every == 0 or step == steps):
            median = sorted(self._recent)[len(self._recent) // 2]
            rows = self._length.rows(steps) - self._length.rows(step)
            left = int(median * rows / self._length.batch(step))  # as long as rows take now
            eta = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
            print(f"step {step:,}/{steps:,}  {text}  ETA {eta}", file=sys.stderr, flush=True)

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        """Prints bits per byte on the held-out rows, in total and per source."""
        if not self._shown:
            return
        parts = [
            f"{name.partition('/')[2] or 'all'} {value:.3f}"
            for name, value in values.items()
            if name.startswith("bits_per_byte")
        ]
        tqdm.write(f"held-out bits per byte at step {step:,}: {', '.join(parts)}", file=sys.stdout)
        sys.stdout.flush()

    def tasks(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the figures of the tasks that the run is judged by."""
        if self._shown:
            found = [f"{n} {v:.4f}" for n, v in values.items() if not n.startswith(STDERR)]
            tqdm.write(f"tasks at step {step:,}: {', '.join(found)}", file=sys.stdout)
            sys.stdout.flush()

    def cut(self, step: int, values: Mapping[str, Any]) -> None:
        """Says that the network has become smaller."""
        if self._shown:
            tqdm.write(
                f"cut after step {step:,}: {values['parameters']:,} parameters live",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def compaction(self, step: int, values: Mapping[str, Any]) -> None:
        """Says what the smaller network is that the run goes on with."""
        if self._shown:
            zeros = values["parameters"] - values["live"]
            filled = f", {zeros:,} of them zeros that fill up widths" if zeros else ""
            tqdm.write(
                f"compacted after step {step:,}: {values['parameters']:,} parameters{filled}, width "
                f"{values['width']}, layers x heads/KV heads x MLP width {values['stacks']}",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
