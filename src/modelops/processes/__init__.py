"""Take chunks from the worker, run them in warm, limited runner processes, hand outcomes on to the worker."""
