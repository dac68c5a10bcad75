"""The CPU stand-in for CUDA is active inside its block and nowhere else."""

import threading

import pytest
import torch

from chatlearn_vllm.engines.megatron.cpu import cuda_means_cpu


def test_cuda_means_cpu_inside_the_block_only():
    before = dict(vars(torch.cuda))
    with cuda_means_cpu(), cuda_means_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        torch.cuda.synchronize()
    assert torch.zeros(2).type() == "torch.FloatTensor"
    assert dict(vars(torch.cuda)) == before


def test_everything_is_put_back_after_an_error():
    before = dict(vars(torch.cuda))
    with pytest.raises(KeyError), cuda_means_cpu():
        raise KeyError("from inside")
    assert dict(vars(torch.cuda)) == before
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_each_thread_enters_for_itself():
    before = dict(vars(torch.cuda))
    entered, leave = threading.Event(), threading.Event()

    def work():
        with cuda_means_cpu():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with cuda_means_cpu():
        thread.start()
        entered.wait(10)
    # the other thread is still inside: functions stay replaced, this thread's calls are plain
    assert torch.cuda.current_device().type == "cpu"
    assert torch.zeros(2).type() == "torch.FloatTensor"
    leave.set()
    thread.join()
    assert dict(vars(torch.cuda)) == before


def test_as_a_decorator_it_lasts_for_each_call():
    @cuda_means_cpu()
    def kind() -> str:
        return torch.zeros(1).type()

    assert [kind(), kind()] == ["torch.cuda.FloatTensor"] * 2
    assert torch.zeros(1).type() == "torch.FloatTensor"
