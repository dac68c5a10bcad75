"""How does a placement plan become running ranks, and how do all of them end again?"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from chatlearn_vllm.config import JobConfig
from chatlearn_vllm.config.server_checks import START
from chatlearn_vllm.job.placement import RankPlacement, place
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.errors import RankId
from chatlearn_vllm.runtime.rollout_checks import check_engines_on_cpus
from chatlearn_vllm.runtime.worker import Rendezvous, Worker, process_environment
from chatlearn_vllm.runtime.worker_group import PendingCall, RankHandle, WorkerGroup, gather

logger = get_logger(__name__)

LOCAL_RAY_SETTINGS = {
    # Ranks start with an environment of their own, so idle workers made ahead are never used.
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
    # Processes that a rank has started end with it, also when the rank is killed.
    "process_group_cleanup_enabled": True,
}
"""Ray's internal settings for a cluster that this job starts for itself."""

RELEASE_TIMEOUT_S = 10.0
PLACEMENT_TIMEOUT_S = 60.0
PROCESS_EXIT_TIMEOUT_S = 10.0
SIGNAL_WAIT_S = 1.0
_QUEUE = re.compile(r"/dev/shm/psm_\w+")


class Cluster:
    """The processes of one job.

    Joins the Ray cluster of `RAY_ADDRESS`, or that of `ray start` on this host, else starts one
    on this host and stops it again.

    Example:
        cluster = Cluster(job, modules)
        try:
            groups = cluster.start()
        finally:
            cluster.stop()
    """

    def __init__(self, job: JobConfig, modules: Sequence[BaseModule]) -> None:
        """Plan who runs where; starts nothing.

        Args:
            job: with the devices of each model and who shares them.
            modules: the models to start; models of the yaml that are not among them get nothing.
        """
        self._job = job
        self._modules = {module.name: module for module in modules}
        self._plan = place(job, only=list(self._modules))
        self._job_id = uuid.uuid4().hex[:12]
        self._ranks: list[RankHandle] = []
        self._placement_group: PlacementGroup | None = None
        self._node_id: str | None = None
        """Ray's id of this host."""
        self._connected_here = False
        self._started_ray = False
        self._ray_processes: list[int] = []
        """Of a Ray that was started here."""
        self._ended_queues: set[Path] = set()
        """`_queues` of ranks that `end` has ended."""
        self._previous_handler: Any = None
        """Of SIGTERM, if `start` set its own."""

    def start(self) -> dict[str, WorkerGroup]:
        """Start one process per rank and make its module; returns the groups by model name.

        Raises:
            UserError: there are no GPUs, and a model's engine needs them for what it is asked for.
            RuntimeError: the cluster has not enough free devices.
            RankError: a rank failed to start.
        """
        self._connect()
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler ends the process on the spot, without stop().
            self._previous_handler = signal.signal(signal.SIGTERM, _exit)
        self._node_id = ray.get_runtime_context().get_node_id()
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        if not has_gpu:
            check_engines_on_cpus(self._job, self._modules.values())
        self._check_resources(has_gpu)
        logger.info("placement on %s:\n%s", "GPUs" if has_gpu else "CPUs", self._plan.describe())
        bundle_order = self._reserve_devices(has_gpu)
        for placement in self._plan.ranks:
            self._ranks.append(self._start_rank(placement, bundle_order, has_gpu))
        self._locate_ranks()
        check_servers_on_one_host(self._job, self._ranks)
        self._build_modules()
        return {
            name: WorkerGroup(name, [rank for rank in self._ranks if rank.id.module == name])
            for name in self._modules
        }

    def stop(self, keep_logs_in: Path | None = None) -> None:
        """End every process that `start` made, with its children; safe to call at any time.

        Args:
            keep_logs_in: directory that Ray's log files are moved to; None drops them. Applies to
                a Ray that this job started.
        """
        with _uninterrupted():
            queues = self._queues() | self._ended_queues
            if ray.is_initialized() and not self._started_ray:
                self._remove_ranks()
            if self._connected_here:
                ray.shutdown()  # ends a Ray that was started here, with all its processes
                self._connected_here = False
            self._wait_for_exit()
            self._ranks, self._placement_group = [], None
            if self._started_ray:
                remove_sessions(keep_logs_in)
                self._started_ray = False
            # What a killed rank could not remove itself; such names contain the job's id.
            for leftover in (*Path("/dev/shm").glob(f"*{self._job_id}*"), *queues):
                leftover.unlink(missing_ok=True)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def end(self, names: Collection[str]) -> None:
        """End the ranks of some models, whatever they work on, and wait for their memory.

        Ranks of other hosts are not waited for.
        """
        ending = [rank for rank in self._ranks if rank.id.module in names]
        self._ended_queues |= self._queues()
        for rank in ending:
            ray.kill(rank.actor)
        deadline = time.monotonic() + PROCESS_EXIT_TIMEOUT_S
        for rank in self._ranks_here():
            while rank in ending and _is_running(rank.location.pid):
                if time.monotonic() > deadline:
                    os.kill(rank.location.pid, signal.SIGKILL)
                    break
                time.sleep(0.05)

    def outlives_signal(self) -> bool:
        """Whether Ray goes on running after this process has got a signal.

        A Ray that was started here is in this process's group; of a SIGTERM to the whole group its
        helpers die at once, its main processes seconds later.
        """
        time.sleep(SIGNAL_WAIT_S if self._ray_processes else 0)
        return all(_is_running(process) for process in self._ray_processes)

    # ---- start ------------------------------------------------------------------------------

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        environment = self._job.runtime_env
        options = {
            "runtime_env": {
                key: list(value) if isinstance(value, tuple) else value
                for key in ("pip", "py_modules", "working_dir", "excludes")
                if (value := getattr(environment, key))
            },
            "logging_level": logging.ERROR,
            "log_to_driver": True,
        }
        self._connected_here = True
        if existing_cluster():
            ray.init(**options)
            logger.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
        else:
            self._started_ray = True
            before = _children()
            _start_local_ray(max(os.cpu_count() or 1, self._num_cpus_needed()), options)
            self._ray_processes = sorted(_children() - before)

    def _num_cpus_needed(self) -> int:
        """Logical CPUs: as many per device as one of them has processes, and for CPU models."""
        cpus = sum(rank.num_cpu for rank in self._plan.ranks)
        return cpus + self._plan.num_bundles * self._ranks_per_bundle()

    def _check_resources(self, has_gpu: bool) -> None:
        if has_gpu:
            needed = {"GPU": self._plan.num_bundles, "CPU": self._num_cpus_needed()}
        else:
            cpus = sum(rank.num_cpu for rank in self._plan.ranks)
            needed = {"CPU": cpus + self._plan.num_bundles}
        _require(needed, ray.cluster_resources(), "the cluster has", self._job.path)
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        # What a job that has just ended gives back is seen a moment later.
        while _missing(needed, ray.available_resources()) and time.monotonic() < deadline:
            time.sleep(0.2)
        _require(needed, ray.available_resources(), "free are", self._job.path)

    def _ranks_per_bundle(self) -> int:
        """The most ranks that share a device."""
        bundles = range(self._plan.num_bundles)
        return max((len(self._plan.on_bundle(bundle)) for bundle in bundles), default=0)

    def _reserve_devices(self, has_gpu: bool) -> list[int]:
        """Reserve one bundle per device; returns the bundles' indices, those of a host adjacent."""
        if self._plan.num_bundles == 0:
            return []
        # Alike, because the hosts decide later which bundle stands for which device.
        bundle = {"GPU": 1, "CPU": self._ranks_per_bundle()} if has_gpu else {"CPU": 1}
        bundles = [bundle] * self._plan.num_bundles
        self._placement_group = placement_group(bundles, strategy="PACK")
        if not self._placement_group.wait(PLACEMENT_TIMEOUT_S):
            raise RuntimeError(
                f"Ray did not reserve {len(bundles)} devices within {PLACEMENT_TIMEOUT_S:g} s; "
                "another job may have taken them"
            )
        hosts = placement_group_table(self._placement_group)["bundles_to_node_id"]
        return sorted(hosts, key=lambda bundle: (hosts[bundle], bundle))

    def _start_rank(
        self, placement: RankPlacement, bundle_order: Sequence[int], has_gpu: bool
    ) -> RankHandle:
        on_gpu = has_gpu and placement.bundle is not None
        of_role = self._modules[placement.model].gpu_environment
        environment = process_environment(on_gpu, _python_path(), self._job_id, of_role)
        options = {"runtime_env": {"env_vars": environment}}
        if placement.bundle is None:
            options["num_cpus"] = placement.num_cpu
        else:
            # Ray counts in ten-thousandths; rounded up, three thirds would exceed a device.
            share = math.floor(placement.share * 10_000) / 10_000
            options |= {"num_gpus": share, "num_cpus": 1} if on_gpu else {"num_cpus": share}
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=bundle_order[placement.bundle]
            )
        rank = RankId(placement.model, placement.replica, placement.rank, placement.world_size)
        actor = ray.remote(Worker).options(**options).remote(rank, os.getcwd())
        return RankHandle(rank, actor)

    def _locate_ranks(self) -> None:
        locations = gather(
            [PendingCall(rank, "locate", rank.actor.locate.remote()) for rank in self._ranks]
        )
        self._ranks = [
            dataclasses.replace(rank, location=location)
            for rank, location in zip(self._ranks, locations, strict=True)
        ]

    def _build_modules(self) -> None:
        pickled = {
            name: cloudpickle.dumps((type(module), self._job))
            for name, module in self._modules.items()
        }
        first_rank = {
            (rank.id.module, rank.id.replica): rank for rank in self._ranks if rank.id.rank == 0
        }
        pending = []
        for rank, placement in zip(self._ranks, self._plan.ranks, strict=True):
            master = first_rank[rank.id.module, rank.id.replica].location
            rendezvous = Rendezvous(master.host, self._local_rank(rank))
            neighbours = self._plan.neighbours(placement)
            build = rank.actor.build.remote(rendezvous, pickled[rank.id.module], neighbours)
            pending.append(PendingCall(rank, "build", build))
        gather(pending)
        self._choose_ports(first_rank)

    def _choose_ports(self, first_rank: dict[tuple[str, int], RankHandle]) -> None:
        """Give each replica a port of its own; late, so that few others can take it before."""
        taken: set[tuple[str, int]] = set()
        port_of = {}
        for replica, rank in first_rank.items():
            while True:
                call = PendingCall(rank, "free_port", rank.actor.free_port.remote())
                (port,) = gather([call])
                if (rank.location.host, port) not in taken:
                    break
            taken.add((rank.location.host, port))
            port_of[replica] = port
        gather(
            [
                PendingCall(
                    rank,
                    "meet_at",
                    rank.actor.meet_at.remote(port_of[rank.id.module, rank.id.replica]),
                )
                for rank in self._ranks
            ]
        )

    def _local_rank(self, rank: RankHandle) -> int:
        """The GPU's index on its host; on CPU the rank's place in its replica on its host."""
        if rank.location.device is not None:
            return rank.location.device
        return sum(
            other.id.module == rank.id.module
            and other.id.replica == rank.id.replica
            and other.id.rank < rank.id.rank
            and other.location.node_id == rank.location.node_id
            for other in self._ranks
        )

    # ---- stop -------------------------------------------------------------------------------

    def _remove_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank.actor)
        if self._placement_group is not None:
            remove_placement_group(self._placement_group)

    def _ranks_here(self) -> list[RankHandle]:
        return [
            rank
            for rank in self._ranks
            if rank.location is not None and rank.location.node_id == self._node_id
        ]

    def _queues(self) -> set[Path]:
        """Shared memory of vLLM's queues between the ranks of this host.

        Python's own tracker would remove it, and ends with the rank when Ray does.
        """
        files: set[Path] = set()
        for rank in self._ranks_here():
            with suppress(OSError):
                maps = Path(f"/proc/{rank.location.pid}/maps").read_text()
                files |= {Path(name) for name in _QUEUE.findall(maps)}
        return files

    def _wait_for_exit(self) -> None:
        """Wait until the ranks of this host have ended; end those that do not."""
        deadline = time.monotonic() + PROCESS_EXIT_TIMEOUT_S
        for rank in self._ranks_here():
            while _is_running(rank.location.pid):
                if time.monotonic() > deadline:
                    os.kill(rank.location.pid, signal.SIGKILL)
                    break
                time.sleep(0.05)
            if self._started_ray:
                # Its children are in its group; Ray ends them unless it was killed itself.
                with suppress(ProcessLookupError):
                    os.killpg(rank.location.pid, signal.SIGKILL)


def check_servers_on_one_host(job: JobConfig, ranks: Sequence[RankHandle]) -> None:
    """Check that each vLLM server that the job starts gets devices of one host only.

    Raises:
        RuntimeError: a replica lies on several.
    """
    hosts_of: dict[tuple[str, int], dict[str, None]] = {}
    for rank in ranks:
        if job.models[rank.id.module].model_args.vllm_server == (START,):
            hosts = hosts_of.setdefault((rank.id.module, rank.id.replica), {})
            hosts[rank.location.host] = None
    for (name, replica), hosts in hosts_of.items():
        if len(hosts) > 1:
            model = job.models[name]
            raise RuntimeError(
                f"models.{name}: the {model.ranks_per_replica} devices of replica {replica} are on "
                f"{len(hosts)} hosts ({', '.join(hosts)}), a vLLM server that the job starts takes "
                f"those of one; lower tensor_model_parallel_size="
                f"{model.tensor_model_parallel_size} x pipeline_model_parallel_size="
                f"{model.pipeline_model_parallel_size} to what a host has free, or start the "
                "server yourself and give its URL as vllm_server"
            )


def existing_cluster() -> bool:
    """Whether `ray.init()` would find a cluster that still answers.

    Ray notes the address of the last `ray start` in a file, and leaves the file behind when the
    cluster is killed. Private clusters of other jobs on this host are not in it.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return address != "local"
    noted = _ray_dir() / "ray_current_cluster"
    if not noted.exists():
        return False
    host, _, port = noted.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        logger.warning("%s names a Ray cluster that does not answer; starting one", noted)
        return False
    return True


def _ray_dir() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def _start_local_ray(num_cpus: int, options: dict[str, Any]) -> None:
    """Start Ray on this host; once more if an overloaded host exceeds Ray's fixed 30 s."""
    start = functools.partial(
        ray.init,
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        _system_config=LOCAL_RAY_SETTINGS,
        **options,
    )
    try:
        with _no_children_left_by_failure():
            start()
    except Exception as error:  # Ray raises this very class
        if "timed out during startup" not in str(error):
            raise
        logger.warning("Ray did not start within its time limit; trying once more")
        ray.shutdown()
        with _no_children_left_by_failure():
            start()


@contextmanager
def _no_children_left_by_failure() -> Iterator[None]:
    """End what the body started if it fails or is interrupted; Ray's own start does not."""
    before = psutil.Process().children(recursive=True)
    try:
        yield
    except BaseException:
        started = set(psutil.Process().children(recursive=True)).difference(before)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, PROCESS_EXIT_TIMEOUT_S)
        raise


def _missing(needed: dict[str, float], there: dict[str, float]) -> list[str]:
    """Kinds of resources of which there is too little."""
    return [kind for kind, amount in needed.items() if amount > there.get(kind, 0)]


def _require(needed: dict[str, float], there: dict[str, float], verb: str, job_path: str) -> None:
    shortages = [
        f"{needed[kind]:g} {kind}s needed, {verb} {there.get(kind, 0):g}"
        for kind in _missing(needed, there)
    ]
    if shortages:
        raise RuntimeError(
            f"the Ray cluster is too small for {job_path}: {'; '.join(shortages)}. "
            "Lower num_gpu / num_cpu of the models, let models share devices "
            "(runtime.colocation), or add hosts"
        )


def _python_path() -> str:
    """The driver's import path, so that ranks find the user's classes as the script does."""
    return os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def remove_sessions(keep_logs_in: Path | None) -> None:
    """Remove the directories that Ray made for this process; their names end with its id.

    Args:
        keep_logs_in: directory that the log files are moved to. Where that is impossible, on a full
            disk for example, they stay where Ray wrote them: the job's own error is to be seen.
    """
    for session in _ray_dir().glob(f"session_*_{os.getpid()}"):
        logs = session / "logs"
        if keep_logs_in is not None and logs.is_dir():
            try:
                shutil.rmtree(keep_logs_in, ignore_errors=True)
                keep_logs_in.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(str(logs), str(keep_logs_in))
            except OSError as error:
                shutil.rmtree(keep_logs_in, ignore_errors=True)
                logger.warning(
                    "Ray's logs stay in %s; moving them to %s failed: %.200s",
                    logs, keep_logs_in, error,
                )  # fmt: skip
                continue
            logger.info("Ray's logs are in %s", keep_logs_in)
        shutil.rmtree(session, ignore_errors=True)
    latest = _ray_dir() / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C and SIGTERM: a second one must not leave half of the ranks running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
