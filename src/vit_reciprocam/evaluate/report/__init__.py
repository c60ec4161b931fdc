"""Tables, intervals, plots and pages made of runs."""
