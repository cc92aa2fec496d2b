"""Text out of a network: prompts in, tokens drawn one after another, strings out."""
