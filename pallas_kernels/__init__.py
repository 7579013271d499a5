"""One device: arrays in, arrays out. No mesh, no model, no config."""
