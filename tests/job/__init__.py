"""Tests of chatlearn_vllm.job."""
