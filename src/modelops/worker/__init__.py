"""Take a chunk from the driver; run it in processes, write its segment, hand back a receipt."""
