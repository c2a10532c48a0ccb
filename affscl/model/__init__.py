"""From a crop to a unit vector: backbone, attention, norms, the network, extraction. Tensors, no labels."""
