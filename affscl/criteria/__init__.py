"""From one batch to a loss: memories, contrast, classifiers. Gradients live here."""
