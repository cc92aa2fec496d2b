"""What is measured of a trained model: benchmarks, and the grading of what it writes."""
