"""Take what the modeler writes in Python or in files; hand on studies, jobs and their results."""
