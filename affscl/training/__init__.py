"""A run: its settings, its batches, its folder, its processes, its loop and its commands."""
