"""Raw text to rows of tokens: corpora, tokenizers, packing, the row store, the plan and the mixture."""
