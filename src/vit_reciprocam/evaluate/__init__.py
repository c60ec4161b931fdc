"""Methods measured on data sets: runs, their folders, and reports of them."""
