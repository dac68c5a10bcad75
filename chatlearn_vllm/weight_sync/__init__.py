"""Moving weights from training ranks into live engine parameters, with proof.

    planner.py         which rectangle of which training rank goes where; complete or refused
    links.py           what lies between two ranks, and who sends what several hold
    report.py          `chatlearn-vllm sync-plan`: what a sync would move
    sync_options.py    ... of which model between which ranks
    sender.py          a training rank's side of a sync
    receiver.py        an engine rank's side
    transport.py       same host: one process's tensors are read by another
    cuda_ipc.py        ... on GPUs: how their memory is opened
    pieces.py          ... where the bytes of a rectangle lie
    kernels.py         ... thousands of rectangles in one launch (triton_kernels.py: on the device)
    remote.py          other host: a link between two ranks
    buckets.py         ... what travels in which message
    schedule.py        ... in which order a rank works its links
    digest.py          the number that stands for the bytes of a rectangle
    verify.py          the digests of a rank's tensors
    lora.py            adapters, merged where they arrive

The driver's part, which calls both sides in order, is `runtime/weight_synchronizer.py`;
docs/weight_sync.md tells the whole.
"""
