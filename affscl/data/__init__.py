"""Crops and what is known of them: datasets, synthetic people, the store, augmentation, sampling. NumPy and bytes, no network."""
