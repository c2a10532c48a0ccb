"""After training: find people, look at clusters, export networks, report on runs."""
