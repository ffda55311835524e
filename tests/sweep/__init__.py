"""Every causal language model of transformers, small, through the product's own path: `make sweep`."""
