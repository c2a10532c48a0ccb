"""From all features at once to pseudo labels: neighbours, Jaccard distance, clusters, links. No gradient."""
