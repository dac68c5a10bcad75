"""What flows between models: prompts in, batches of samples out."""
