"""One engine: models, cache, scheduler, sampling, and the two compiled drivers around one forward pass."""
