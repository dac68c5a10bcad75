"""Tests of chatlearn_vllm.cli."""
