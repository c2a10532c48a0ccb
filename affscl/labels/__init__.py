"""From all features at once to pseudo labels: neighbours, Jaccard distance, clusters, links between cameras. No gradient."""
