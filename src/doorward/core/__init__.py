"""What everything else is built on: records, errors, seeds, budgets, formatting."""
