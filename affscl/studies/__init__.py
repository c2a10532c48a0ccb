"""Questions that take many runs, and measurements of speed and memory."""
