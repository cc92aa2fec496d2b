"""Parts of the report: reading a run's metrics, drawing curves, filling the page."""
