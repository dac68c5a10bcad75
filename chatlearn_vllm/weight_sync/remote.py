"""How do planned copies travel between ranks that cannot read each other's memory?

A *link* joins one training rank to one rollout rank: on another host, or on a GPU without peer
access. It is a process group of its own with these two members (NCCL for GPUs, gloo for CPUs), so
both processes keep the default groups that they have, and a training rank and a rollout rank that
share a GPU never meet in one NCCL communicator. Pieces are packed into buckets; while one bucket
travels, the next is packed and the last is unpacked.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync.buckets import ALIGNMENT, Bucket, plan_buckets
from chatlearn_vllm.weight_sync.links import BUCKET_BYTES
from chatlearn_vllm.weight_sync.planner import Copy, fingerprint

_POLL_S = 50e-6
_GIVE_UP_S = 10.0
_SENDER, _RECEIVER = 0, 1


class LinkAddress(NamedTuple):
    """What an end of a link has to know to open it."""

    peer: int
    """Rank at the other end."""
    name: str
    host: str
    """Of the sender."""
    port: int
    through_host: bool = False
    """Whether buckets lie in main memory: one of the ends has no GPU."""


class LinkError(RuntimeError):
    """A transfer failed: the message names the link, its ends, this end and the phase."""


class Link:
    """One end of a connection between a training rank and a rollout rank.

    The group is made at the first transfer and kept until `close`; the next transfer makes a new
    one. A failure ends the link for good.

    Example:
        link = Link(host, port, "trainer 3 -> policy 1", is_sender=True, device="cuda")
        link.send(copies, parameters)      # meanwhile link.receive(copies, parameters) over there
        link.close()
    """

    def __init__(
        self,
        host: str,
        port: int,
        name: str,
        *,
        is_sender: bool,
        device: torch.device | str,
        timeout_s: float = 600.0,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Describe the link; nothing is opened yet.

        Args:
            host: address of the sender that the receiver can reach.
            port: free TCP port there; links of one sender may share it.
            name: different for each link of a sender; names both ranks, for error messages.
            is_sender: which end this is.
            device: where the buckets lie: this rank's GPU, or "cpu". The same kind at both ends.
            timeout_s: longest wait in seconds for the other end, which may be busy with other
                links first, and for each bucket.
            bucket_bytes: the same at both ends.

        Raises:
            ValueError: `bucket_bytes` is too small.
        """
        if bucket_bytes < ALIGNMENT:
            raise ValueError(f"bucket_bytes={bucket_bytes} must be at least {ALIGNMENT}")
        self.name = name
        self._host, self._port = host, port
        self._rank, self._peer = (_SENDER, _RECEIVER) if is_sender else (_RECEIVER, _SENDER)
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._store: dist.Store | None = None
        self._group: Any = None
        self._phase = ""
        self._is_broken = False
        self._num_groups = 0
        self._num_transfers = 0

    @torch.no_grad()
    def send(self, copies: Sequence[Copy], tensors: Mapping[str, torch.Tensor]) -> None:
        """Send the sources of `copies`; on return they have arrived.

        Args:
            copies: the receiver must be given the same, in any order.
            tensors: this rank's parameters, on the link's device or in ordinary memory.

        Raises:
            LinkError: the other end is gone, late, or was given other copies.
        """
        with self._reporting_failures(), self._on_device():
            dtypes = {copy.source_param: tensors[copy.source_param].dtype for copy in copies}
            on_gpu = any(tensors[name].is_cuda for name in dtypes)
            is_staged = on_gpu and self._device.type == "cpu"
            self._meet(copies, dtypes)
            buckets = plan_buckets(copies, dtypes, self._bucket_bytes)
            buffers = self._buffers(buckets)
            works: list[dist.Work] = []
            for index, bucket in enumerate(buckets):
                self._phase = f"sending bucket {index + 1} of {len(buckets)}"
                if index >= 2:  # the last user of this buffer
                    self._wait(works[index - 2])
                for piece in bucket:
                    source = tensors[piece.source_param][_slices(piece.source)]
                    piece.packed(buffers[index % 2]).copy_(source, non_blocking=True)
                if is_staged:
                    torch.cuda.synchronize()
                message = buffers[index % 2][: bucket[-1].stop]
                works.append(self._group.send([message], self._peer, index))
            self._phase = "waiting for the confirmation"
            for work in works[-2:]:
                self._wait(work)
            confirmation = torch.empty(1, dtype=torch.uint8, device=self._device)
            self._wait(self._group.recv([confirmation], self._peer, len(buckets)))

    @torch.no_grad()
    def receive(self, copies: Sequence[Copy], targets: Mapping[str, torch.Tensor]) -> int:
        """Receive what the other end sends into the targets of `copies`.

        Args:
            copies: the sender must be given the same, in any order.
            targets: this rank's parameters, written in place; values are converted to their dtype.

        Returns:
            Bytes written, on return complete on the device.

        Raises:
            LinkError: the other end is gone, late, or was given other copies.
        """
        num_bytes = 0
        with self._reporting_failures(), self._on_device():
            buckets = plan_buckets(copies, self._meet(copies), self._bucket_bytes)
            buffers = self._buffers(buckets)
            works: list[dist.Work] = []
            for index, bucket in enumerate(buckets):
                self._phase = f"receiving bucket {index + 1} of {len(buckets)}"
                for arriving in range(len(works), min(index + 2, len(buckets))):
                    message = buffers[arriving % 2][: buckets[arriving][-1].stop]
                    works.append(self._group.recv([message], self._peer, arriving))
                self._wait(works[index])
                for piece in bucket:
                    target = targets[piece.target_param][_slices(piece.target)]
                    packed = piece.packed(buffers[index % 2]).view(target.shape)
                    target.copy_(packed, non_blocking=True)
                    num_bytes += target.nbytes
            self._phase = "confirming"
            confirmation = torch.ones(1, dtype=torch.uint8, device=self._device)
            self._wait(self._group.send([confirmation], self._peer, len(buckets)))
        return num_bytes

    def close(self) -> None:
        """Close the group, which frees its memory; call it at both ends or at none.

        The sender's port stays open as long as the object lives, so neither end has to wait for
        the other before it opens the link again.
        """
        if self._group is not None:
            self._group.shutdown()
            self._group = None
            self._num_groups += 1
            self._num_transfers = 0

    def give_up(self, reason: str) -> None:
        """End the link: the other end, which may be waiting for the next transfer, fails at once.

        Args:
            reason: told to the other end.
        """
        if self._is_broken:
            return
        self._is_broken = True
        if self._group is not None:
            self._group.abort()
            self._group = None
        with suppress(RuntimeError):  # no connection: nobody is waiting there
            store, mine, _ = self._next_meeting(min(_GIVE_UP_S, self._timeout_s))
            store.set(mine, json.dumps([None, reason]))

    def _meet(
        self, copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> dict[str, torch.dtype]:
        """Wait for the other end and compare plans.

        Args:
            copies: this end's.
            dtypes: of the source parameters, if this is the sender.

        Returns:
            The sender's `dtypes`.
        """
        self._phase = "meeting the other end"
        if self._is_broken:
            raise RuntimeError("an earlier transfer failed; make a new link under another name")
        store, mine, theirs = self._next_meeting(self._timeout_s)
        self._num_transfers += 1
        plan = [self._bucket_bytes, fingerprint(copies)]
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in (dtypes or {}).items()}
        store.set(mine, json.dumps([plan, names]))
        their_plan, their_names = json.loads(store.get(theirs))
        store.delete_key(theirs)
        if their_plan is None:
            raise RuntimeError(f"the other end gave up: {their_names}")
        if their_plan != plan:
            raise RuntimeError("both ends must be given the same copies and bucket_bytes")
        if self._group is None:
            self._phase = "connecting"
            self._group = self._open_group(dist.PrefixStore("group", store))
        return {name: getattr(torch, dtype) for name, dtype in (names or their_names).items()}

    def _next_meeting(self, connect_timeout_s: float) -> tuple[dist.Store, str, str]:
        """The store of the next transfer, and the keys of this and of the other end in it."""
        if self._store is None:
            self._store = dist.TCPStore(
                self._host,
                self._port,
                is_master=self._rank == _SENDER,
                timeout=timedelta(seconds=connect_timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        store = dist.PrefixStore(f"{self.name}/{self._num_groups}", self._store)
        keys = [f"transfer {self._num_transfers}, rank {rank}" for rank in (self._rank, self._peer)]
        return store, *keys

    def _open_group(self, store: dist.Store) -> Any:
        timeout = timedelta(seconds=self._timeout_s)
        if self._device.type == "cpu":
            gloo = dist.ProcessGroupGloo._Options()
            # By default gloo listens on the address of the host's name, often a loopback address.
            address = _own_address_towards(self._host, self._port)
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            gloo._timeout = timeout
            return dist.ProcessGroupGloo(store, self._rank, 2, gloo)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = 2 * timeout  # `_wait` gives up before it
        # Otherwise NCCL's watchdog answers a failure by ending the process.
        with _environment_variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
            return dist.ProcessGroupNCCL(store, self._rank, 2, nccl)

    def _buffers(self, buckets: Sequence[Bucket]) -> list[torch.Tensor]:
        num_bytes = max((bucket[-1].stop for bucket in buckets), default=0)
        return [torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in buckets[:2]]

    def _wait(self, work: dist.Work) -> None:
        """Wait until a bucket has travelled, on the GPU too."""
        if self._device.type == "cuda":
            deadline = time.monotonic() + self._timeout_s
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no progress in timeout_s={self._timeout_s:g}")
                time.sleep(_POLL_S)
        work.wait()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make the link's GPU the current one; at the end wait for what was queued there."""
        if self._device.type == "cpu":
            yield
            return
        with torch.cuda.device(self._device):
            yield
            torch.cuda.current_stream().synchronize()

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        """On a failure cut the connection, so that the other end fails too, and say what failed."""
        try:
            yield
        except BaseException as error:
            if self._group is not None:
                self._group.abort()
                self._group = None  # gloo closes its connection with the last reference
            self._is_broken = True
            if isinstance(error, RuntimeError | OSError):
                end = "sender" if self._rank == _SENDER else "receiver"
                raise LinkError(f"link {self.name}, {end}, {self._phase}: {error}") from error
            raise


def _own_address_towards(host: str, port: int) -> str:
    """This host's address on the route to another; sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _slices(rect: Rect) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in rect)


def listen() -> dist.TCPStore:
    """Listen, on a port that the system chooses, for the other ends of this process's links.

    Returns:
        The store, to be kept as long as links may be opened; `.port` is the port. Choosing the
        port earlier and listening later would now and then find it taken.
    """
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def open_links(
    addresses: Sequence[LinkAddress], *, is_sender: bool, device: torch.device, timeout_s: float
) -> dict[int, Link]:
    """Make this rank's ends of some links, by the rank at the other end; in the given order."""
    return {
        address.peer: Link(
            address.host,
            address.port,
            address.name,
            is_sender=is_sender,
            device="cpu" if address.through_host else device,
            timeout_s=timeout_s,
        )
        for address in addresses
    }


@contextmanager
def all_or_none(links: Iterable[Link]) -> Iterator[None]:
    """If the body fails, give all links up: ranks may be waiting there that it never came to."""
    try:
        yield
    except BaseException as error:
        for link in links:
            link.give_up(f"{type(error).__name__}: {error}")
        raise
