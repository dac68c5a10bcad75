"""The `chatlearn-vllm` command."""
