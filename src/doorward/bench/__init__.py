"""The bench: suites expand to trials, trials to results, results to tables."""
