"""How good a served model is, and how far two ways of serving it are apart: perplexity, divergence, multiple choice."""
