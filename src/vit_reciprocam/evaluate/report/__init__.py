"""Tables, intervals, plots and pages from runs."""
