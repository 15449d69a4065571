"""One command at many thresholds, strengths and seeds, and the fronts that they make."""
