"""Tests of chatlearn_vllm.config."""
