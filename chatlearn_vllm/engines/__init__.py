"""The only builders of vLLM and megatron-core objects."""
