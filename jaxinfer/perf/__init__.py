"""Measuring: ceilings of the machine, counted work of a model, latency definitions, and the ideal time of a trace."""
