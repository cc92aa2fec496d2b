"""Parts on a cluster, through Apache Beam: whatever runs its pipelines prepares text."""

import re
from collections.abc import Sequence

from mobilellm_jax.data.parts import PartJob, prepare_part
from mobilellm_jax.errors import UserError


def prepare_parts(jobs: Sequence[PartJob], options: Sequence[str]) -> None:
    """Does those of the jobs that are not done yet as one pipeline, and waits for its end.

    Args:
      jobs: what to do; the directories of their sources must be those of every worker too.
      options: of the pipeline, as on a command line: `--runner=DirectRunner`.

    Raises:
      UserError: Beam is not installed, or a part failed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--beam needs Apache Beam: pip install 'mobilellm-jax[beam]' into an environment of its "
            "own (see docs/preparing.md)."
        ) from None
    todo = [job for job in jobs if not job.writer.is_written(job.number)]
    try:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            _ = (
                pipeline
                | "parts" >> beam.Create(todo)
                | "spread" >> beam.Reshuffle()  # or a runner may do them all in one worker
                | "prepare" >> beam.Map(prepare_part)
            )
    except Exception as error:  # each runner has its own, with the part's somewhere in their text
        text = f"{type(error).__name__}: {error}"
        told = re.findall(r"UserError: (.*?)(?: \[while running|\n|$)", text)
        if not told:
            raise
        raise UserError(f"{told[-1]} The parts that are done stay; run it again.") from None
