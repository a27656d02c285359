"""Take what clients ask, drive all jobs, keep records and reality in agreement, hand on status and results."""
